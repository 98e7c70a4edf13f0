"""The files of a folder laid out like Pascal VOC: which images a split lists, and what they are."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from dataclasses import dataclass

from PIL import Image

from ..errors import UserError
from .image_files import SPELLING, Listing, ambiguous, files_below, list_folder, spelling_key
from .reader import Tally
from .text import read_lines

logger = logging.getLogger(__name__)

# In VOC's lists per class: -1 without, 1 with an object of the class, 0 with difficult ones only.
_FLAG = re.compile(r"\s+(-1|0|1|\+1)$")


@dataclass
class Files:
    """The files below a folder, hidden ones left out, by name without extension.

    Attributes:
        folder: their folder.
        names: all names, relative to the folder.
        by_stem: names by their path without extension, ``sub/a`` for ``sub/a.jpg``.
        by_key: such paths by what all their spellings have in common.
        by_base: such paths by their last part.
    """

    folder: str
    names: set[str]
    by_stem: dict[str, list[str]]
    by_key: dict[str, list[str]]
    by_base: dict[str, list[str]]

    @classmethod
    def below(cls, root: str, sub: str, extensions: set[str]) -> Files:
        """
        Args:
            extensions: those of the files that count, in lower case.
        """
        folder = os.path.join(root, sub)
        _listing(folder)  # That it is there.
        names = set(files_below(folder, extensions))
        by_stem: dict[str, list[str]] = {}
        for name in sorted(names):
            by_stem.setdefault(os.path.splitext(name)[0], []).append(name)
        by_key: dict[str, list[str]] = {}
        by_base: dict[str, list[str]] = {}
        for stem in by_stem:
            by_key.setdefault(spelling_key(stem), []).append(stem)
            by_base.setdefault(spelling_key(stem.rpartition("/")[2]), []).append(stem)
        return cls(folder, names, by_stem, by_key, by_base)

    def stem(self, name: str) -> str | None:
        """The path without extension that a name stands for; None if there is no such file.

        Raises:
            UserError: there are several, in subfolders or in spellings that are alike.
        """
        if name in self.by_stem:
            return name
        found = self.alike(name) or ([] if "/" in name else self.of_base(name))
        if len(found) > 1:
            raise ambiguous(name, [self.path(self.by_stem[f][0]) for f in found])
        return found[0] if found else None

    def alike(self, stem: str) -> list[str]:
        return self.by_key.get(spelling_key(stem), [])

    def of_base(self, stem: str) -> list[str]:
        return self.by_base.get(spelling_key(stem.rpartition("/")[2]), [])

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)


def annotation_files(root: str) -> Files:
    return Files.below(root, "Annotations", {".xml"})


def image_files(root: str) -> Files:
    extensions = Image.registered_extensions()
    return Files.below(root, "JPEGImages", {e for e, f in extensions.items() if f in Image.OPEN})


def split_file(root: str, split: str) -> str:
    """The path of the list of a split's images.

    Raises:
        UserError: there is none.
    """
    folder = os.path.join(root, "ImageSets", "Main")
    files = _listing(folder).files
    splits = sorted(f[:-4] for f in files if f.endswith(".txt") and not f.startswith("."))
    if split not in splits:
        raise UserError(
            f"split {split!r} does not exist in {folder}: "
            f"choose one of {', '.join(splits) or '(none found)'}"
        )
    return os.path.join(folder, f"{split}.txt")


def listed_stems(path: str, annotations: Files, tally: Tally) -> list[str]:
    """What a split file lists: the path of each annotation below its folder, without ``.xml``.

    A line is a name, which may have blanks and dots in it; or a name with an extension, a flag (as
    in VOC's lists per class) or both. Which of these is told by the annotations that there are.
    Empty lines and comments (``# ...``) are left out. Flags are ignored.

    Raises:
        UserError: it cannot be read, a line may be one of several images, or an image is listed
            twice.
    """
    readings = [
        (line, _named(line, annotations), _flagged(line, annotations))
        for line in map(str.strip, read_lines(path))
        if line and (not line.startswith("#") or _named(line, annotations))
    ]
    # A list has flags or it has none: the lines that can be read in one way alone decide.
    if any(flagged for _, _, flagged in readings):
        logger.info("%s: flags behind names are ignored, every image listed is taken", path)
    flags = any(flagged and not named for _, named, flagged in readings)
    blanks = any(n and not f and _FLAG.search(line) for line, n, f in readings)
    stems = []
    for line, named, flagged in readings:
        if named and flagged and flags == blanks:
            raise UserError(
                f"{path}: {line!r} may be image {named!r}, or image {flagged!r} and a flag: "
                "rename one of them"
            )
        if flagged and (flags or not named):
            stems.append(flagged)
        else:
            stems.append(named or _FLAG.sub("", line))
        if stems[-1].rpartition("/")[2] not in line:
            tally.add(SPELLING, f"{line!r} in {path} as {stems[-1]}")
    for stem, count in Counter(stems).items():
        if count > 1:
            raise UserError(f"{path}: image {stem} is listed {count} times: list it once")
    return stems


def annotation_path(stem: str, annotations: Files) -> str:
    if stem not in annotations.by_stem:
        path = annotations.path(f"{stem}.xml")
        raise UserError(f"annotation file {path} does not exist: add it or correct the split")
    return annotations.path(annotations.by_stem[stem][0])


def image_of(stem: str, named: str, images: Files, annotations: Files, tally: Tally) -> str | None:
    """The path of the image of an annotation; None if there is none.

    It has the annotation's name, and an extension of an image. It may be in a subfolder, or be
    spelt otherwise, if no other annotation can be meant.

    Args:
        stem: the annotation's path below its folder, without ``.xml``.
        named: what the annotation calls its image; only chooses between files of one name.
        tally: counts another spelling.

    Raises:
        UserError: it may be one of several files.
    """
    if stem in images.names:
        return images.path(stem)
    found = [stem] if stem in images.by_stem else []
    if not found and len(annotations.alike(stem)) <= 1:
        found = images.alike(stem)
    if not found and len(annotations.of_base(stem)) <= 1:
        found = [f for f in images.of_base(stem) if "/" not in stem or "/" not in f]
    files = [file for f in found for file in images.by_stem[f]]
    if not files:
        return None
    if len(files) > 1:
        named = re.split(r"[/\\]", named)[-1]
        key = spelling_key(named)
        chosen = [f for f in files if f.rpartition("/")[2] == named]
        chosen = chosen or [f for f in files if spelling_key(f.rpartition("/")[2]) == key]
        if len(chosen) != 1:
            raise UserError(
                f"image {stem} may be {' or '.join(map(images.path, files))}: name it in "
                "<filename> of its xml, or move the others away"
            )
        files = chosen
    path = images.path(files[0])
    if os.path.splitext(os.path.basename(path))[0] != stem.rpartition("/")[2]:
        tally.add(SPELLING, f"{stem} as {path}")
    return path


def _named(line: str, annotations: Files) -> str | None:
    """The annotation of a name with or without an extension or the name of its folder."""
    if line in annotations.by_stem:
        return line
    name = re.sub(r"^(\./)?((JPEGImages|Annotations)/)?", "", line.replace("\\", "/"))
    return annotations.stem(name) or annotations.stem(_without_extension(name))


def _flagged(line: str, annotations: Files) -> str | None:
    name = _FLAG.sub("", line)
    return None if name == line else _named(name, annotations)


def _without_extension(name: str) -> str:
    stem, extension = os.path.splitext(name)
    known = extension.lower() in Image.registered_extensions() or extension.lower() == ".xml"
    return stem if known else name


def _listing(folder: str) -> Listing:
    if not os.path.isdir(folder):
        raise UserError(
            f"{folder} does not exist: `root` must hold Annotations, ImageSets/Main and JPEGImages"
        )
    listing = list_folder(folder)
    if listing.closed:
        raise UserError(f"folder {folder} may not be listed: make it readable")
    return listing

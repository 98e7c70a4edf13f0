"""Finding the image files that annotations name, also under another spelling of their names."""

from __future__ import annotations

import contextlib
import os
import re
import unicodedata
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from functools import cached_property
from urllib.parse import unquote

from ..errors import UserError

SPELLING = "images found under another spelling of their name"
FOLDER = "images found without the folders that their name begins with"

# Drives, shares and URLs.
_AWAY = re.compile(r"[A-Za-z][A-Za-z+]*:(/|\\)|\\\\")


@dataclass
class Listing:
    """The names in one folder."""

    files: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)
    closed: bool = False  # It may not be listed.

    @cached_property
    def by_key(self) -> dict[str, list[str]]:
        keys: dict[str, list[str]] = {}
        for name in sorted(self.files | self.folders):
            keys.setdefault(spelling_key(name), []).append(name)
        return keys


class ImageFiles:
    """Image files on disk. Each folder is listed once: asking for 100 000 files takes long."""

    def __init__(self, root: str | os.PathLike | None = None) -> None:
        """
        Args:
            root: the folder that names are relative to, if there is one.
        """
        self._root = None if root is None else os.fspath(root)
        parts = "" if root is None else os.path.abspath(root)
        self._root_keys = [spelling_key(p) for p in parts.split(os.sep) if p]
        self._listings: dict[str, Listing] = {}

    def exists(self, path: str) -> bool:
        """Whether a file has exactly this name."""
        folder, file = os.path.split(path)
        return file in self.listing(folder).files

    def find(self, path: str) -> tuple[str, str] | None:
        """The file that a name stands for, where none has exactly that name.

        A name may have backslashes, escapes of URLs (``%20``), composed or decomposed letters,
        capitals elsewhere (``.JPG``), or blanks around it. Folders before the name of the root are
        left out where they agree with the root's own (``train2017/1.jpg`` in ``coco/train2017``),
        or where the path or URL is of another machine and of no other split.

        Returns:
            The file and what differs, `SPELLING` or `FOLDER`; None if there is none.

        Raises:
            UserError: it might be one of several files.
        """
        base, name = self._split(path)
        spellings = list(dict.fromkeys(_parts(s) for s in _spellings(name)))
        found = {self._walk(base, parts) for parts in spellings if parts}
        kind = SPELLING
        if found <= {None} and self._root is not None:
            away = base == os.sep or _AWAY.match(name) is not None
            inner = {rest for parts in spellings for rest in self._inner(parts, away)}
            found = {self._walk(self._root, rest) for rest in inner}
            kind = FOLDER
        found.discard(None)
        if len(found) > 1:
            raise ambiguous(path, found)
        return (found.pop(), kind) if found else None

    def listing(self, folder: str) -> Listing:
        """What a folder holds; nothing if it does not exist."""
        if folder not in self._listings:
            self._listings[folder] = list_folder(folder)
        return self._listings[folder]

    def _split(self, path: str) -> tuple[str, str]:
        """The folder that a name starts from, and the rest."""
        for base in (self._root, os.sep):
            if base is not None and path.startswith(os.path.join(base, "")):
                return base, path[len(os.path.join(base, "")) :]
        return "", path

    def _inner(self, parts: tuple[str, ...], away: bool) -> Iterator[tuple[str, ...]]:
        """What may be left of a name below the root."""
        root = self._root_keys
        keys = [spelling_key(p) for p in parts]
        if away:
            yield parts  # Absolute, as seen from the root.
        for i, key in enumerate(keys[:-1], start=1):
            if not root or key != root[-1]:
                continue
            splits = _split_words(keys[:i]), _split_words(root)
            if (away and not (all(splits) and splits[0].isdisjoint(splits[1]))) or (
                keys[:i] == root[-i:]
            ):
                yield parts[i:]

    def _walk(self, folder: str, parts: tuple[str, ...]) -> str | None:
        for i, part in enumerate(parts):
            last = i + 1 == len(parts)
            here = self.listing(folder)
            kind = here.files if last else here.folders
            names = [part]
            # The way may lead through a folder that may be entered and not listed.
            if part != ".." and part not in kind and (last or not here.closed):
                names = [n for n in here.by_key.get(spelling_key(part), ()) if n in kind]
            if not names:
                return None
            if len(names) > 1:
                raise ambiguous(os.path.join(folder, part), names)
            folder = os.path.join(folder, names[0])
        return os.path.normpath(folder)


def files_below(folder: str | os.PathLike, extensions: Set[str]) -> Iterator[str]:
    """The files in a folder and its subfolders, links followed, as paths below it with "/".

    Hidden ones are left out; a folder that is reached by two ways counts once.

    Args:
        extensions: those of the files that count, in lower case.

    Raises:
        UserError: a folder may not be listed.
    """
    yield from _files_below(os.fspath(folder), "", set(), extensions)


def _files_below(folder: str, below: str, seen: set[str], extensions: Set[str]) -> Iterator[str]:
    here = os.path.join(folder, below)
    real = os.path.realpath(here)
    if real in seen:  # A link to a folder above it.
        return
    seen.add(real)
    listing = list_folder(here)
    if listing.closed:
        raise UserError(f"folder {here} may not be listed: make it readable")
    for name in sorted(listing.files):
        if not name.startswith(".") and os.path.splitext(name)[1].lower() in extensions:
            yield below + name
    for name in sorted(listing.folders):
        if not name.startswith(".") and name != "__MACOSX":
            yield from _files_below(folder, f"{below}{name}/", seen, extensions)


def list_folder(folder: str) -> Listing:
    """The files and folders in a folder, without links to nowhere; "" is the working folder."""
    listing = Listing()
    try:
        with os.scandir(folder or ".") as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # A link to itself.
                    if entry.is_dir():
                        listing.folders.add(entry.name)
                    elif not entry.is_symlink() or entry.is_file():
                        listing.files.add(entry.name)
    except PermissionError:
        return Listing(closed=True)
    except (OSError, ValueError):  # Not there, too long, or no name of a folder at all.
        return Listing()
    return listing


def spelling_key(name: str) -> str:
    """What all spellings of a name have in common."""
    return unicodedata.normalize("NFC", unquote(name).strip()).casefold()


def ambiguous(name: str, files: set[str] | list[str]) -> UserError:
    return UserError(
        f"image {name} may be {' or '.join(sorted(files))}: write its name as it is on disk"
    )


def _spellings(name: str) -> Iterator[str]:
    if "://" in name:
        name = re.sub(r"[?#].*", "", name)
    for text in (name, unquote(name)):
        yield text
        yield text.replace("\\", "/")


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split("/") if part not in ("", "."))


def _split_words(keys: list[str]) -> set[str]:
    """The splits that the folders of a path name: "val2017" and "valid" are one."""
    words = {w for key in keys for w in re.split(r"[^a-z]+", key)}
    names = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
    return {names[w] for w in words if w in names}

"""Images from files, folders and videos, one after the other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image

from ..data import dataset_dicts
from ..data.folder import IMAGES
from ..data.image_files import files_below
from ..data.images import read_header, upright_name
from ..engine.console import say
from ..engine.run_folder import RunFolder
from ..errors import UserError, first_line

VIDEOS = {
    *(".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"),
    *(".wmv", ".asf", ".flv", ".3gp", ".ogv", ".vob", ".mts", ".m2ts"),
}
# A folder may be full of .ts files that are programs.
_NAMED_VIDEOS = VIDEOS | {".ts"}


@dataclass(frozen=True)
class Source:
    """A file to read.

    Args:
        path: as given, or below a folder that was.
        name: relative, unique among the sources, with "/" between folders.
    """

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in _NAMED_VIDEOS


class UnreadableError(UserError):
    """A file is no image or video, or not to its end; the others may be."""


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """The images and videos that inputs name, those of a folder and its subfolders by name.

    Hidden files and those of other kinds in a folder are not looked at; one that is named is. A
    file that two inputs name, a folder and one above it, say, is had once.

    Raises:
        UserError: an input does not exist, a folder has neither image nor video, or two inputs
            would give results of one name.
    """
    found: list[Source] = []
    for given in inputs:
        path = Path(os.path.expanduser(given))
        if os.path.isdir(path):  # Unlike the path's own method, for a name of any length.
            files = sorted(path / name for name in files_below(path, IMAGES | VIDEOS))
            if not files:
                raise UserError(f"{given}: there is no image or video in this folder")
            found += [Source(p, p.relative_to(path).as_posix()) for p in files]
        elif os.path.exists(path):
            found.append(Source(path, path.name))
        else:
            raise UserError(f"{given}: no such file or folder")
    by_path: dict[str, Source] = {}
    for source in found:
        by_path.setdefault(os.path.abspath(source.path), source)
    names: dict[str, Path] = {}
    for source in by_path.values():
        other = names.setdefault(source.name, source.path)
        if other.resolve() != source.path.resolve():
            raise UserError(
                f"{other} and {source.path} would both be called {source.name}: give the folder "
                "above them, or one after the other"
            )
    return list({source.name: source for source in by_path.values()}.values())


def read_frames(source: Source, image_format: str, every: int) -> Iterator[tuple[str, np.ndarray]]:
    """An image, or of a video each so many-th frame, with its name.

    An image is turned as its EXIF says, a frame as the video says; frames are named by their
    number, from 0.

    Args:
        image_format: "BGR" or "RGB", of the arrays (height, width, 3), uint8.

    Raises:
        UnreadableError: it cannot be read.
    """
    if not source.is_video:
        yield source.name, _read_image(source.path, image_format)
        return
    video = cv2.VideoCapture(str(source.path))
    try:
        if not video.isOpened():
            raise UnreadableError("OpenCV cannot open this video")
        # Some versions leave it out by default, and a telephone's portraits lie on their side.
        video.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
        number = 0
        while video.grab():
            if number % every == 0:
                read, frame = video.retrieve()
                if not read:
                    raise UnreadableError(f"OpenCV cannot read frame {number}")
                frame = frame if image_format == "BGR" else frame[..., ::-1]
                yield f"{source.name}/{number:06d}", frame
            number += 1
        if number == 0:
            raise UnreadableError("OpenCV reads no frame of this video")
        # What a file says of its length is an estimate in some forms.
        if number < 0.95 * (told := int(video.get(cv2.CAP_PROP_FRAME_COUNT))) - 1:
            raise UnreadableError(
                f"OpenCV reads {number} of its {told} frames; what was found on these is kept"
            )
    finally:
        video.release()


def _of_record(record: dict, image_format: str) -> Iterator[tuple[str, np.ndarray]]:
    name = os.fspath(record["file_name"])  # Of pathlib, a remote one would lose a "/".
    yield name, _read_image(name, image_format)


def _read_image(path: Path | str, image_format: str) -> np.ndarray:
    try:
        header = read_header(str(path))
        if header.too_deep:
            raise UnreadableError(header.too_deep)
        image = read_image(upright_name({"file_name": str(path)}), image_format)
    except UnreadableError:
        raise
    except Exception as error:  # Pillow's readers raise whatever they meet.
        raise UnreadableError(first_line(error)) from error
    if header.several:
        say(f"note: {path} holds several pictures: the first is read")
    return image


def evenly_spaced(total: int, count: int) -> list[int]:
    """So many of the numbers below total, each in the middle of its share; all if it has fewer."""
    count = min(count, total)
    return [int((i + 0.5) * total / count) for i in range(count)]


def photographs(
    run: RunFolder, image_format: str, images: Sequence[str], count: int
) -> list[np.ndarray]:
    """Images (height, width, 3) uint8 to check with: those named, or of the run's test data.

    The latter are evenly spaced; for those that cannot be read, others are taken.

    Raises:
        UserError: there are none that can be read.
    """
    if images:
        readers = [read_frames(source, image_format, 1) for source in find_sources(images)]
    else:
        try:
            records = dataset_dicts(dataset=run.test_dataset(), filter_empty=False)
        except UserError as error:
            raise UserError(f"{error}; or name photographs with --images") from error
        chosen = evenly_spaced(len(records), count)
        chosen += sorted(set(range(len(records))) - set(chosen))
        readers = [_of_record(records[i], image_format) for i in chosen]
    found: list[np.ndarray] = []
    for reader in readers:
        with contextlib.suppress(UnreadableError):
            for _, image in reader:
                found.append(image)
                if len(found) == count:
                    return found
    if not found:
        raise UserError("none of the images can be read: name others with --images")
    return found

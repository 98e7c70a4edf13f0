"""Reading the pixels of images: which way up, and which files are refused."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from detectron2.data.detection_utils import SizeMismatchError, read_image
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler
from PIL import Image, UnidentifiedImageError

from ..errors import UserError

logger = logging.getLogger(__name__)

_ORIENTATION = 274  # EXIF and TIFF have one number for it.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNS_BACK = _TURNS | {6: _TURNS[8], 8: _TURNS[6]}
# What detectron2's mappers may ask for; each has 8 bits per channel.
_FORMATS_OF_8_BITS = ("BGR", "RGB", "L", "YUV-BT.601")
# So many times as long as wide, an image may have no width where it is resized.
_THIN = 100
_STORED, _UPRIGHT = "dfd-stored://", "dfd-upright://"

_told: set[str] = set()


@dataclass(frozen=True)
class Header:
    """What a file says of its image, without its pixels.

    Attributes:
        mode: Pillow's.
        stored: width and height as stored.
        upright: width and height after the turn that its EXIF data ask for.
        orientation: the EXIF value of that turn; 1 is none.
        tiff: whether it is a TIFF.
        several: whether it holds more than one picture.
    """

    mode: str
    stored: tuple[int, int]
    upright: tuple[int, int]
    orientation: int
    tiff: bool
    several: bool

    @property
    def too_deep(self) -> str:
        """Why ``read_image`` would read white or black: more than 8 bits; empty if it would not."""
        if not self.mode.startswith(("I", "F")):
            return ""
        return f"its one channel has more than 8 bits (Pillow's mode {self.mode})"


def read_header(file_name: str) -> Header:
    """The header of an image file.

    Raises:
        OSError and others of Pillow's: it is no image.
    """
    with PathManager.open(file_name, "rb") as f, Image.open(f) as image:
        orientation = _orientation(image)
        stored = image.size
        tiff = image.format == "TIFF"
        if tiff:  # Newer versions of Pillow give the size of a TIFF after the turn.
            stored = image.tag_v2[256], image.tag_v2[257]
        # The second picture of a photograph in MPO form is a preview or for the other eye.
        several = image.format != "MPO" and getattr(image, "is_animated", False)
    upright = stored[::-1] if orientation >= 5 else stored
    return Header(image.mode, stored, upright, orientation, tiff, several)


def image_size(file_name: str) -> tuple[int, int]:
    """Width and height in pixels of an image as it is read, turned as its EXIF data ask for.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return read_header(file_name).upright
    except Exception as e:
        raise _cannot_load(file_name, e) from e


def upright_name(record: dict) -> str:
    """What to give to detectron2's ``read_image``, so that pixels and annotations agree.

    That function turns an image as its EXIF data ask for. Where the record's size is that of the
    image as stored and not as turned, the annotations are in stored pixels, and the name is one
    under which the image is read as stored. Else it is the file's own.

    Args:
        record: detectron2's, with ``file_name``, and ``width`` and ``height`` if known.
    """
    try:
        return _name_to_read(record, read_header(record["file_name"]))
    except Exception:  # Reading the image will tell.
        return record["file_name"]


class ReadableMapper:
    """A mapper whose pixels agree with the annotations, and whose failures name the image.

    The mapper reads by detectron2's ``read_image``, as detectron2's own do. An image with one
    channel of more than 8 bits is refused: ``read_image`` would cut its values off at 255. A
    mapper without ``image_format`` may read in its own way, and is only warned about.
    """

    def __init__(self, mapper: Callable[[dict], Any]) -> None:
        self.mapper = mapper

    def __call__(self, record: dict) -> Any:
        file_name = os.fspath(record["file_name"])
        try:
            header = read_header(file_name)
        except Exception:  # The mapper may read what Pillow does not.
            return self._map(record)
        self._check_depth(file_name, header)
        if header.several:
            _tell_once("it holds several pictures: the first is read", file_name)
        name = _name_to_read(record, header)
        if name == file_name:
            return self._map(record)
        try:
            mapped = self._map({**record, "file_name": name})
        except Exception:
            if hasattr(self.mapper, "image_format"):
                raise
            return self._map(record)  # It opens files by itself.
        if isinstance(mapped, dict) and mapped.get("file_name") == name:
            mapped["file_name"] = record["file_name"]
        return mapped

    def _map(self, record: dict) -> Any:
        try:
            return self.mapper(record)
        except UserError:
            raise
        except (OSError, SizeMismatchError) as e:
            raise _cannot_load(record["file_name"], e) from e
        except Exception as error:
            # Pillow has many errors, a mapper has more: ask whether it is the image.
            try:
                height, width = read_image(record["file_name"], "RGB").shape[:2]
            except Exception as e:
                raise _cannot_load(record["file_name"], e) from e
            if max(height, width) > _THIN * min(height, width):
                # A side of it is rounded to no pixel, say.
                raise _cannot_load(record["file_name"], error) from error
            raise

    def _check_depth(self, file_name: str, header: Header) -> None:
        what = header.too_deep
        if not what:
            return
        wanted = getattr(self.mapper, "image_format", None)
        if wanted in _FORMATS_OF_8_BITS:
            raise UserError(
                f"cannot load image {file_name}: {what}, and would be read as white or black: "
                "convert the images to 8 bits, by the range of values that yours have"
            )
        if wanted is None:
            _tell_once(f"{what}: detectron2's read_image cuts them off at 255", file_name)


def _name_to_read(record: dict, header: Header) -> str:
    file_name = os.fspath(record["file_name"])
    if header.orientation == 1:
        return file_name
    size = record.get("width"), record.get("height")
    if size == header.stored != header.upright:
        _tell_once(
            "its annotations have the size before the turn that its EXIF data ask for: it is "
            "read without that turn",
            file_name,
        )
        return f"{_STORED}{file_name}"
    if header.stored == header.upright:
        _tell_once(
            "its EXIF data turn it, and its size does not tell whether the annotations were made "
            "before or after that: they are taken for made after it",
            file_name,
        )
    # Newer versions of Pillow turn a TIFF themselves, and detectron2 once more.
    return f"{_UPRIGHT}{file_name}" if header.tiff else file_name


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Damaged EXIF data, which detectron2 passes over too.
        return 1
    return value if value in _TURNS else 1


def _tell_once(what: str, file_name: str) -> None:
    if what not in _told:
        _told.add(what)
        logger.warning("image %s: %s (told for the first such image)", file_name, what)


def _cannot_load(file_name: str | os.PathLike, error: Exception) -> UserError:
    file_name = os.fspath(file_name).removeprefix(_STORED).removeprefix(_UPRIGHT)
    reason, remedy = " ".join(str(error).split()) or type(error).__name__, "repair or leave out"
    if isinstance(error, Image.DecompressionBombError):
        remedy = "cut into tiles, scale down or leave out"
    elif isinstance(error, UnidentifiedImageError) and os.path.isfile(file_name):
        if os.path.getsize(file_name) == 0:
            reason = "the file is empty"
    return UserError(f"cannot load image {file_name} ({reason}): {remedy} the file")


class _Turned(PathHandler):
    """Images behind a prefix: their pixels alone, as stored or turned once by their EXIF data.

    This is the way of detectron2's file handlers to reach whatever reads an image by them.
    """

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def _get_supported_prefixes(self) -> list[str]:
        return [self._prefix]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> io.BytesIO:
        with PathManager.open(path.removeprefix(self._prefix), "rb") as f, Image.open(f) as image:
            orientation = _orientation(image)
            image.load()
            left = _orientation(image)  # None where Pillow has turned it.
            turn = _TURNS.get(left)
            if self._prefix == _STORED:
                turn = None if left == orientation else _TURNS_BACK[orientation]
            pixels = image if image.mode in ("L", "RGB") else image.convert("RGB")
            pixels = pixels if turn is None else pixels.transpose(turn)
        plain = io.BytesIO()
        pixels.save(plain, "PPM")
        plain.seek(0)
        return plain


for _prefix in (_STORED, _UPRIGHT):
    PathManager.register_handler(_Turned(_prefix), allow_override=True)

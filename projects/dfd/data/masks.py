"""Masks and keypoints of an annotation in the one form that Detectron2 and pycocotools share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from .numbers import NUMBERS, as_number, as_whole, plain

FEW_POINTS = "annotations dropped, polygon with less than 3 points"
UNREADABLE = "annotations dropped, mask cannot be read"
OTHER_SIZE = "annotations dropped, mask of another size than the image"
NO_PIXEL = "annotations dropped, mask without a pixel in the image"
ONE_LIST = "masks converted, polygon not in a list of its own or of points in pairs"
BITMAP = "masks converted, given pixel by pixel in lists"
TEXT = "masks converted, numbers given as text"

# Pixels. pycocotools draws an outline point by point, and crashes on one without an end.
_FAR = 1e6
# From so many rows of zeros and ones on, they are a mask of another size than the image.
_LEAST_ROWS = 8


class Unusable(ValueError):
    """A mask that cannot be used; the message is the kind under which it is counted."""


def plain_segmentation(
    value: Any, width: float, height: float
) -> tuple[list[list[float]] | dict[str, Any] | None, str | None]:
    """
    Args:
        value: polygons or run lengths as in COCO, or numpy's arrays of either; or a mask (h,w).
        width, height: of the image in pixels, inf where they are not known.

    Returns:
        Polygons of at least three points, or compressed run lengths; None for an empty value. And
        the kind under which it is counted, if it was converted. A value that is fine comes back as
        the same object.

    Raises:
        Unusable: it is none of these.
    """
    if type(value) is list and value and all(map(_is_plain_polygon, value)):
        polygons, note = value, None
    elif isinstance(value, Mapping):
        return (_run_lengths(value, width, height) if value else None), None
    else:
        bitmap = _bitmap(value, height, width)
        if bitmap is not None:
            return _encoded(bitmap, height, width), BITMAP if isinstance(value, list) else None
        polygons, note = _polygons(_deeply_plain(value))
    if polygons is not None and not any(_in_image(p, width, height) for p in polygons):
        raise Unusable(NO_PIXEL)
    return polygons, note


def _is_plain_polygon(value: Any) -> bool:
    if type(value) is not list or len(value) < 6 or len(value) % 2:
        return False
    if not NUMBERS.issuperset(map(type, value)) or not _all_finite(value):
        return False
    # Or it may be a row of a mask that is given pixel by pixel.
    return max(value) > 1 or min(value) < 0


def _all_finite(numbers: list[float]) -> bool:
    # The sum is quick, and finite only if they all are; COCO has 20 million of them.
    try:
        return math.isfinite(sum(numbers)) and -_FAR < min(numbers) and max(numbers) < _FAR
    except OverflowError:
        return False


def _in_image(polygon: list[float], width: float, height: float) -> bool:
    """Whether the box around a polygon has an area and shares some with the image."""
    xs, ys = polygon[0::2], polygon[1::2]
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    return 0 < right > left < width and 0 < bottom > top < height


def _bitmap(value: Any, height: float, width: float) -> np.ndarray | None:
    """A mask that is given pixel by pixel, (h,w) bool; None if a value is not of that kind."""
    if getattr(value, "shape", None) == (height, width):
        return np.asarray(plain(value)) != 0
    rows = _deeply_plain(value)
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        return None
    if len(rows) < 2 or len({len(row) for row in rows}) > 1 or any(_holds_others(r) for r in rows):
        return None
    # A few short rows may be as many small polygons.
    is_one = (len(rows), len(rows[0])) == (height, width) or len(rows) >= _LEAST_ROWS
    return np.array(rows, dtype=bool) if is_one else None


def _holds_others(row: list) -> bool:
    return not all(isinstance(v, bool | int | float) and v in (0, 1) for v in row)


def _encoded(bitmap: np.ndarray, height: float, width: float) -> dict[str, Any]:
    if bitmap.shape != (height, width):
        raise Unusable(OTHER_SIZE)
    if not bitmap.any():
        raise Unusable(NO_PIXEL)
    return mask_util.encode(np.asfortranarray(bitmap, dtype=np.uint8))


def _deeply_plain(value: Any) -> Any:
    value = plain(value)
    return [_deeply_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _polygons(value: Any) -> tuple[list[list[float]] | None, str | None]:
    if value is None or value == "" or (isinstance(value, list) and not any(map(_filled, value))):
        return None, None
    if not isinstance(value, list):
        raise Unusable(UNREADABLE)
    note = None
    if not any(isinstance(p, list) for p in value) or (
        len(value) >= 3 and all(_is_point(p) for p in value)
    ):
        value, note = [value], ONE_LIST
    result = []
    for polygon in value:
        if not isinstance(polygon, list):
            raise Unusable(UNREADABLE)
        if polygon and all(_is_point(p) for p in polygon):
            polygon, note = [v for point in polygon for v in point], ONE_LIST
        numbers = [as_number(v) for v in polygon]
        if len(numbers) % 2 or any(v is None or not -_FAR < v < _FAR for v in numbers):
            raise Unusable(UNREADABLE)
        if any(isinstance(v, str) for v in polygon):
            note = TEXT
        if len(numbers) >= 6:
            result.append(numbers)
    if not result:
        raise Unusable(FEW_POINTS)
    return result, note


def _filled(value: Any) -> bool:
    return not (isinstance(value, list) and not value)


def _is_point(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and not any(isinstance(v, list) for v in value)
    )


def _run_lengths(value: Mapping[str, Any], width: float, height: float) -> dict[str, Any]:
    size, counts = plain(value.get("size")), plain(value.get("counts"))
    size = [as_whole(side) for side in size] if isinstance(size, list | tuple) else []
    if len(size) != 2 or any(side is None or side <= 0 for side in size):
        raise Unusable(UNREADABLE)
    if math.isfinite(height) and size != [height, width]:
        raise Unusable(OTHER_SIZE)
    if isinstance(counts, str | bytes):
        runs = decoded_counts(counts)
        if runs is None or runs.min() < 0 or runs.sum() != size[0] * size[1]:
            raise Unusable(UNREADABLE)
        if not runs[1::2].any():
            raise Unusable(NO_PIXEL)
        # A json holds text, and so it may go back into one.
        return value if value.get("size") == size else {"size": size, "counts": counts}
    if not isinstance(counts, list | tuple):
        raise Unusable(UNREADABLE)
    lengths = [as_whole(v) for v in counts]
    if any(v is None or v < 0 for v in lengths) or sum(lengths) != size[0] * size[1]:
        raise Unusable(UNREADABLE)
    if not any(lengths[1::2]):
        raise Unusable(NO_PIXEL)
    return mask_util.frPyObjects({"size": size, "counts": lengths}, *size)


def decoded_counts(counts: str | bytes) -> np.ndarray | None:
    """The run lengths that COCO's compressed text stands for; None if it stands for none.

    pycocotools does not check what it decodes: a text of another length makes it read and write
    outside of its memory. Each run is a little-endian number of 5 bits a character, the sixth of
    which says that there are more; from the third on, it is the difference to the last but one.
    """
    if isinstance(counts, str):
        counts = counts.encode("utf-8", "replace")
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    last = np.flatnonzero(codes & 32 == 0)
    first = np.concatenate(([0], last[:-1] + 1))
    length = last - first + 1
    if length.max() > 7:  # More than 32 bits, which pycocotools stores.
        return None
    place = np.arange(codes.size) - np.repeat(first, length)
    runs = np.add.reduceat((codes & 31) << (5 * place), first)
    runs -= np.where(codes[last] & 16, np.int64(1) << (5 * length), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def plain_keypoints(value: Any) -> list[float] | None:
    """x, y and visibility (0, 1 or 2) of every point in one list; None if it is none or empty."""
    if type(value) is list and value and len(value) % 3 == 0:
        fine = NUMBERS.issuperset(map(type, value)) and _all_finite(value)
        if fine and {0, 1, 2}.issuperset(value[2::3]):
            return value
    value = _deeply_plain(value)
    if not isinstance(value, list):
        return None
    if value and all(isinstance(point, list) and len(point) == 3 for point in value):
        value = [v for point in value for v in point]
    numbers = [as_number(v) for v in value]
    if not numbers or len(numbers) % 3 or None in numbers or not all(map(math.isfinite, numbers)):
        return None
    return numbers if {0, 1, 2}.issuperset(numbers[2::3]) else None

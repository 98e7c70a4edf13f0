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
ONE_LIST = "masks converted, polygon not in a list of its own or of points in pairs"
TEXT = "masks converted, numbers given as text"


# Pixels. pycocotools draws an outline point by point, and crashes on one without an end.
_FAR = 1e6


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
    if type(value) is list and value:
        for polygon in value:
            if (
                type(polygon) is not list
                or len(polygon) < 6
                or len(polygon) % 2
                or not NUMBERS.issuperset(map(type, polygon))
                or not _all_finite(polygon)
            ):
                break
        else:
            return value, None
    if isinstance(value, Mapping):
        return (_run_lengths(value, width, height) if value else None), None
    if isinstance(value, np.ndarray) and value.shape == (height, width):
        value = np.asfortranarray(value != 0, dtype=np.uint8)
        return mask_util.encode(value), None
    return _polygons(_deeply_plain(value))


def _all_finite(numbers: list[float]) -> bool:
    # The sum is quick, and finite only if they all are; COCO has 20 million of them.
    try:
        return math.isfinite(sum(numbers)) and -_FAR < min(numbers) and max(numbers) < _FAR
    except OverflowError:
        return False


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
        # A json holds text, and so it may go back into one.
        return value if value.get("size") == size else {"size": size, "counts": counts}
    if not isinstance(counts, list | tuple):
        raise Unusable(UNREADABLE)
    lengths = [as_whole(v) for v in counts]
    if any(v is None or v < 0 for v in lengths) or sum(lengths) != size[0] * size[1]:
        raise Unusable(UNREADABLE)
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

"""What the values of a dataset must be: read, converted, dropped or refused alike in every reader.

A number of another type and the same value (numpy's, a whole float) is read without a word. What is
converted (a number given as text) or dropped is counted in the reader's `Tally`, and what can be
read in two ways, or not at all, is a `UserError` that names it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import UserError
from .images import read_header
from .masks import Unusable, plain_keypoints, plain_segmentation
from .numbers import NUMBERS, as_number, as_whole, plain
from .reader import NO_BOX, Tally

CLASS_CONVERTED = "class ids converted, given as text or as the name of the class"
AREA_COMPUTED = "areas computed, those given are no area within the image"
TEXT_BOX = "boxes converted, given as text"
CROWD_CONVERTED = "iscrowd converted, given as text or null"
NO_KEYPOINTS = "keypoints dropped, not x, y and visibility of every point"
TEXT_SIZE = "image sizes converted, given as text"
FILE_SIZE = "image sizes taken from the files"
IDS_CONVERTED = "image ids converted, of several kinds"

_FLAGS = {"": 0, "null": 0, "none": 0, "false": 0, "true": 1}
_MOST = 2**31  # Pixels of a side, for every library that reads images.
_MISSING = object()


def as_flag(value: Any) -> int | None:
    """0 or 1, None if it is neither; null and empty text are 0."""
    value = plain(value)
    if value is None or isinstance(value, bool):
        return int(bool(value))
    if isinstance(value, str) and value.strip().lower() in _FLAGS:
        return _FLAGS[value.strip().lower()]
    whole = as_whole(value)
    return whole if whole in (0, 1) else None


def as_size(
    width: Any, height: Any, tally: Tally | None = None, where: str = ""
) -> tuple[int, int] | None:
    """Width and height in whole pixels, None if they are not two positive numbers."""
    if type(width) is type(height) is int and 0 < width < _MOST and 0 < height < _MOST:
        return width, height
    size = as_whole(width), as_whole(height)
    if any(side is None or not 0 < side < _MOST for side in size):
        return None
    if tally is not None and (isinstance(width, str) or isinstance(height, str)):
        tally.add(TEXT_SIZE, where)
    return size  # type: ignore[return-value]


def complete_sizes(records: list[dict], tally: Tally) -> None:
    """Gives records without width and height those of their image file, where it can be read."""
    for record in records:
        if "width" not in record and "://" not in record["file_name"]:
            try:
                size = read_header(record["file_name"]).upright
            except Exception:  # Pillow has many errors; what has no size is told by the caller.
                continue
            record["width"], record["height"] = size
            tally.add(FILE_SIZE, record["file_name"])


def as_box(value: Any, tally: Tally, where: Callable[[], str], count: int = 4) -> list | None:
    """So many numbers of a box; None, and counted, if it is anything else."""
    if type(value) is list and len(value) == count and NUMBERS.issuperset(map(type, value)):
        try:
            return [float(v) for v in value]
        except OverflowError:
            pass
    value = plain(value)
    numbers = [as_number(v) for v in value] if isinstance(value, list | tuple) else []
    if len(numbers) != count or None in numbers:
        tally.add(NO_BOX if count == 4 else NO_BOX.replace("four", "five"), where)
        return None
    if any(isinstance(v, str) for v in value) and all(map(math.isfinite, numbers)):
        tally.add(TEXT_BOX, where)
    return numbers


def clean_values(
    annotation: Mapping[str, Any],
    *,
    width: float,
    height: float,
    tally: Tally,
    where: Callable[[], str],
    source: str,
) -> Mapping[str, Any] | None:
    """An annotation whose crowd flag, area, mask and keypoints are what Detectron2 expects.

    Args:
        annotation: as in a COCO json or a record of Detectron2's. It is not changed.
        width, height: of the image in pixels, inf where they are not known.
        where: names the annotation.
        source: the file or dataset, for an error.

    Returns:
        The same object if nothing is to be changed, a copy otherwise; None if it is dropped,
        because it has a mask that cannot be read.

    Raises:
        UserError: ``iscrowd`` is neither 0 nor 1.
    """
    change: dict[str, Any] = {}
    crowd = annotation.get("iscrowd", 0)
    if type(crowd) is not int or not 0 <= crowd <= 1:
        change["iscrowd"] = as_flag(crowd)
        if change["iscrowd"] is None:
            raise UserError(f"{source}: {where()} has iscrowd {crowd!r}: it must be 0 or 1")
        if crowd is None or isinstance(crowd, str):
            tally.add(CROWD_CONVERTED, where)
    area = annotation.get("area", _MISSING)
    # The official small, medium and large APs go by the area; one beyond all counts for none.
    if area is not _MISSING and not (type(area) in NUMBERS and 0 < area <= width * height):
        number = as_number(area)
        if number is None or not 0 < number <= width * height:
            change["area"] = None
            tally.add(AREA_COMPUTED, where)
        else:
            change["area"] = number
            if isinstance(area, str):
                tally.add("areas converted, given as text", where)
    given = annotation.get("segmentation", _MISSING)
    if given is not _MISSING:
        try:
            segmentation, note = plain_segmentation(given, width, height)
        except Unusable as e:
            tally.add(str(e), where)
            return None
        if segmentation is None or segmentation is not given:
            change["segmentation"] = segmentation
        if note:
            tally.add(note, where)
    given = annotation.get("keypoints", _MISSING)
    if given is not _MISSING:
        keypoints = plain_keypoints(given)
        if keypoints is None or keypoints is not given:
            change["keypoints"] = keypoints
        if keypoints is None and plain(given) not in (None, "", []):
            tally.add(NO_KEYPOINTS, where)
    if not change:
        return annotation
    return {k: v for k, v in {**annotation, **change}.items() if v is not None or k not in change}


class Classes:
    """Finds the contiguous id of the class that an annotation names."""

    def __init__(self, ids: Sequence[int], names: Sequence[str]) -> None:
        self._by_id = {category: i for i, category in enumerate(ids)}
        self._by_name = {name: i for i, name in enumerate(names)}

    def find(self, value: Any, tally: Tally, where: Callable[[], str]) -> int | None:
        """The position of a class id or name; None if there is none, or one of each."""
        if type(value) is int:
            return self._by_id.get(value)
        found = {self._by_id.get(as_whole(value))}
        if isinstance(value, str):
            found.add(self._by_name.get(value.strip()))
        found.discard(None)
        if len(found) != 1:
            return None
        if isinstance(value, str):
            tally.add(CLASS_CONVERTED, where)
        return found.pop()


def class_labels(values: Sequence[Any], source: str, tally: Tally | None = None) -> list[str]:
    """Names of classes, stripped; numbers become text.

    Raises:
        UserError: they are no list, a name is empty or no text, or two are the same.
    """
    if isinstance(values, str | Mapping | set | frozenset):
        raise UserError(f"{source}: the class names are {values!r}: give a list of them")
    names = []
    for value in values:
        number = value if isinstance(value, str) else as_whole(value)
        name = "" if number is None else str(number).strip()
        if not name:
            raise UserError(f"{source}: a class has the name {value!r}: give every class a name")
        if name != value and tally is not None:
            tally.add("class names converted, numbers or with blanks around them", repr(value))
        if name in names:
            raise UserError(
                f"{source}: two categories have the same name, {name!r}: make the names unique"
            )
        names.append(name)
    return names


def image_ids(values: Sequence[Any], source: str, tally: Tally) -> list[int] | list[str]:
    """The ids of all images, either all whole numbers or all text, as COCO's tools need them.

    Text stays text where all of them are; among numbers, text that is a number becomes one, and if
    there is other text too, all become text.

    Raises:
        UserError: an id is no whole number or text, does not fit 64 bits, or occurs twice.
    """
    ids = [v if type(v) is int or type(v) is str else plain(v) for v in values]
    if not all(type(v) is str for v in ids):
        ids = [v if type(v) is int else _loose(v) for v in ids]
        if any(type(v) is str for v in ids):
            ids = [v if v is None else str(v) for v in ids]
    seen: dict[Any, Any] = {}
    for value, new in zip(values, ids, strict=True):
        if new is None or new == "" or (type(new) is int and abs(new) >= 2**63):
            raise UserError(
                f"{source}: an image has the id {value!r}: it must be a whole number of at most 64 "
                "bits, or text"
            )
        if new in seen:
            other = "" if seen[new] == value else f" (as {seen[new]!r} and as {value!r})"
            raise UserError(f"{source}: image id {new!r} occurs twice{other}: make it unique")
        seen[new] = value
        if isinstance(value, str) is not isinstance(new, str):
            tally.add(IDS_CONVERTED, repr(value))
    return ids


def _loose(value: Any) -> int | str | None:
    """An id by which text and numbers are compared."""
    whole = as_whole(value)
    return whole if whole is not None else value.strip() if isinstance(value, str) else None


class ImageIndex:
    """Finds the record that an annotation's ``image_id`` names."""

    def __init__(self, records: Sequence[dict]) -> None:
        self._exact = {record["image_id"]: record for record in records}
        self._loosely: dict[Any, dict | None] | None = None

    def find(self, value: Any, tally: Tally, where: Callable[[], str]) -> dict | None:
        """The record; a number is found by text too, unless it could be two images."""
        if type(value) is int or type(value) is str:
            record = self._exact.get(value)
            if record is not None:
                return record
        if self._loosely is None:
            self._loosely = {}
            for image_id, record in self._exact.items():
                key = _loose(image_id)
                self._loosely[key] = None if key in self._loosely else record
        record = self._loosely.get(_loose(value))
        if record is not None and isinstance(value, str) is not isinstance(record["image_id"], str):
            tally.add("image_id of annotations converted, of another kind than the images'", where)
        return record


def file_name(value: Any, source: str, record: Any) -> str:
    """The path of an image.

    Raises:
        UserError: it is missing, empty or no path.
    """
    try:
        path = os.fspath(value)
        path = os.fsdecode(path)
    except TypeError:
        path = ""
    if not path:
        raise UserError(f"{source}: every image needs a `file_name`, not {brief(record)}")
    return path


def brief(value: Any) -> str:
    """A value on one line, not too long."""
    text = re.sub(r"\s+", " ", repr(value))
    return text if len(text) <= 200 else f"{text[:197]}..."

"""Values of records in Detectron2's format that other code made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from detectron2.structures import BoxMode

from ..errors import UserError
from .numbers import NUMBERS, as_whole
from .reader import Tally
from .validation import (
    Classes,
    as_box,
    as_size,
    brief,
    clean_values,
    complete_sizes,
    file_name,
    image_ids,
)

_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS)


def name_of(record: dict) -> str:
    return f"image {record.get('image_id')} ({record['file_name']})"


def clean_records(
    records: Any, source: str, classes: Sequence[str], tally: Tally
) -> list[dict[str, Any]]:
    """Copies of the records with every value as Detectron2 documents it; those given stay.

    Each has ``file_name``, ``image_id`` and ``annotations``, and its size where it or the image
    tells it. Images without any ids are numbered from 1. Each annotation has a box of four numbers
    (five if it is rotated), its mode, and a known class.

    Raises:
        UserError: a record or annotation is none, or has a value that cannot be read in one way.
    """
    if not isinstance(records, list | tuple):
        raise UserError(f"{source}: its function must return a list of dicts, not {brief(records)}")
    for record in records:
        if not isinstance(record, dict):
            raise UserError(f"{source}: every record must be a dict, not {brief(record)}")
    ids = [record.get("image_id") for record in records]
    if ids and all(i is None for i in ids):
        ids = list(range(1, len(ids) + 1))
        tally.counts["image ids given, in the order of the records"] = len(ids)
        tally.examples["image ids given, in the order of the records"] = "from 1"
    ids = image_ids(ids, source, tally)
    result = []
    for record, image_id in zip(records, ids, strict=True):
        name = file_name(record.get("file_name"), source, record)
        size = as_size(record.get("width"), record.get("height"), tally, name)
        clean = {k: v for k, v in record.items() if k not in ("width", "height")}
        clean.update(file_name=name, image_id=image_id)
        if size is not None:
            clean["width"], clean["height"] = size
        result.append(clean)
    complete_sizes(result, tally)
    finder, unknown = Classes(range(len(classes)), classes), Tally()
    for record in result:
        record["annotations"] = _annotations(record, source, finder, tally, unknown)
    if unknown.counts:
        raise UserError(
            f"{source}: {unknown.counts['class']} annotations have a class id outside 0 to "
            f"{len(classes) - 1}, e.g. {unknown.examples['class']}: correct its annotations or its "
            "metadata's thing_classes"
        )
    return result


def _annotations(
    record: dict, source: str, classes: Classes, tally: Tally, unknown: Tally
) -> list[dict]:
    annotations = record.get("annotations")
    annotations = [] if annotations is None else annotations
    if not isinstance(annotations, list | tuple):
        raise UserError(
            f"{source}: {name_of(record)} has annotations {brief(annotations)}: give a list"
        )
    size = {key: record.get(key, math.inf) for key in ("width", "height")}
    result = []

    def where() -> str:
        return name_of(record)

    for annotation in annotations:
        if not isinstance(annotation, dict):
            raise UserError(
                f"{source}: every annotation must be a dict, not {brief(annotation)} in {where()}"
            )
        mode = _mode(annotation, source, record)
        given = annotation.get("bbox")
        box = as_box(given, tally, where, count=5 if mode == BoxMode.XYWHA_ABS else 4)
        if box is None:
            continue
        if mode == BoxMode.XYWHA_ABS and not all(map(math.isfinite, box)):
            tally.add("boxes dropped, not finite", where)
            continue
        value = annotation.get("category_id")
        category = classes.find(value, tally, where)
        if category is None:
            unknown.add("class", f"category_id {brief(value)} in {where()}")
            continue
        clean = clean_values(annotation, **size, tally=tally, where=where, source=source)
        if clean is None:
            continue
        change = {}
        if type(given) is not list or not NUMBERS.issuperset(map(type, given)) or given != box:
            change["bbox"] = box
        if annotation["bbox_mode"] is not mode:
            change["bbox_mode"] = mode
        if type(value) is not int:
            change["category_id"] = category
        result.append({**clean, **change} if change else clean)
    return result


def _mode(annotation: dict, source: str, record: dict) -> BoxMode:
    value = annotation.get("bbox_mode")
    if isinstance(value, BoxMode):
        mode = value
    elif isinstance(value, str):
        mode = BoxMode.__members__.get(value.strip().rpartition(".")[2].upper())
    else:
        whole = as_whole(value)
        mode = BoxMode(whole) if whole in set(BoxMode) else None
    if mode not in _MODES:
        raise UserError(
            f"{source}: an annotation of {name_of(record)} has bbox_mode {value!r}: set it to "
            "BoxMode.XYXY_ABS or BoxMode.XYWH_ABS"
        )
    return mode

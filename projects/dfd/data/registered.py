"""What stands behind a name in detectron2's catalog, whoever registered it.

This package's readers clean and report a dataset when they register it. A dataset that detectron2
or other code registers ("coco_2017_train") is checked and reported here, when it is first read.
"""

from __future__ import annotations

import logging
import math
import os
import re
from typing import Any

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ..errors import UserError, first_line
from .catalog import (
    NO_BOX,
    DatasetReport,
    Tally,
    clean_box,
    drop_missing_images,
    has_objects,
    summarise,
)
from .text import check_plain_json

logger = logging.getLogger(__name__)

REMEDY = "set DETECTRON2_DATASETS to the folder that holds detectron2's datasets"

_reports: dict[str, DatasetReport] = {}


def registered_name(node: Any) -> str:
    """The registered name behind ``dataloader.*.dataset`` of a config.

    The node is a name, a lazy call of one of this package's readers, or detectron2's
    ``get_detection_dataset_dicts(names=...)``, of which the first name is taken.
    """
    if isinstance(node, str):
        return node
    names = node.get("names")
    if names is not None:
        return names if isinstance(names, str) else names[0]
    return instantiate(node)


def dataset_dicts(*, dataset: str, filter_empty: bool = True) -> list[dict]:
    """The records of a registered dataset, in detectron2's format.

    A dataset that none of this package's readers registered is checked every time and reported in
    the log once per process. Its degenerate boxes are left out of the records: detectron2's mapper
    would drop them without a word. A box that leaves its image is counted and left to the mapper,
    which clips it. Rotated boxes are not checked.

    Args:
        dataset: a registered name.
        filter_empty: leave out images without an annotation that is not a crowd.

    Raises:
        UserError: the name is not registered, its files do not exist or cannot be read, an image
            is missing, a class is unknown, or no image is left.
    """
    if dataset not in DatasetCatalog:
        raise UserError(
            f"dataset {dataset!r} is not registered: use one of dfd.data's readers or "
            "a name that detectron2 registers, such as coco_2017_train"
        )
    try:
        records = DatasetCatalog.get(dataset)
    except UserError:
        raise
    except FileNotFoundError as e:
        raise no_file(dataset, e.filename) from e
    except (AssertionError, KeyError, ValueError) as e:
        check_plain_json(dataset, MetadataCatalog.get(dataset).get("json_file"))
        raise UserError(
            f"dataset {dataset} cannot be read ({first_line(e)}): correct its annotations"
        ) from e
    if MetadataCatalog.get(dataset).get("dfd_report") is None:
        records = _checked(dataset, records)
    kept = [r for r in records if has_objects(r)] if filter_empty else records
    if not kept:
        raise UserError(
            f"dataset {dataset} has {len(records)} images and none of them has an "
            "object: correct its annotations, or set filter_empty=False"
        )
    if len(kept) < len(records):
        logger.info("%s: %d of %d images have objects", dataset, len(kept), len(records))
    return kept


def class_names(dataset: str) -> list[str]:
    """The class names of a registered dataset; position is the contiguous class id.

    Raises:
        UserError: the name is not registered or the dataset has no class names.
    """
    if not hasattr(MetadataCatalog.get(dataset), "thing_classes"):
        dataset_dicts(dataset=dataset, filter_empty=False)  # COCO files set the names when read.
    return _classes(dataset)


def dataset_report(dataset: str) -> DatasetReport:
    """What a registered dataset holds and what was left out of it, whoever registered it.

    Raises:
        UserError: as ``dataset_dicts``.
    """
    own = MetadataCatalog.get(dataset).get("dfd_report")
    if own is not None:
        return own
    if dataset not in _reports:
        dataset_dicts(dataset=dataset, filter_empty=False)
    return _reports[dataset]


def _classes(dataset: str) -> list[str]:
    names = MetadataCatalog.get(dataset).get("thing_classes")
    if not names:
        raise UserError(f"dataset {dataset} has no class names: set its metadata's thing_classes")
    return list(names)


def no_file(dataset: str, path: str) -> UserError:
    """The error for a file that a dataset registered elsewhere is read from."""
    return UserError(f"dataset {dataset}: {path} does not exist: {REMEDY}")


def _checked(dataset: str, records: list[dict]) -> list[dict]:
    """The records without degenerate boxes; those given stay as they are."""
    classes = _classes(dataset)
    tally, unknown = Tally(), Tally()
    checked = []
    for record in records:
        annotations = record.get("annotations", [])
        kept = [a for a in annotations if _has_box(a, record, tally)]
        for annotation in kept:
            category = annotation.get("category_id", -1)
            if not 0 <= category < len(classes):
                unknown.add("class", f"category_id {category} in {_where(record)}")
        if len(kept) < len(annotations):
            record = {**record, "annotations": kept}
        checked.append(record)
    if unknown.counts:
        raise UserError(
            f"dataset {dataset}: {unknown.counts['class']} annotations have a class id outside 0 "
            f"to {len(classes) - 1}, e.g. {unknown.examples['class']}: correct its annotations or "
            "its metadata's thing_classes"
        )
    checked = _found(dataset, checked, tally)
    if dataset not in _reports:
        source = MetadataCatalog.get(dataset).get("json_file")
        report = summarise(
            dataset,
            checked,
            classes=classes,
            source=source or "registered by other code",
            images_in_source=len(records),
            tally=tally,
            ground_truth=source,
        )
        _reports[dataset] = report
        logger.info("%s", report)
    return checked


def _found(dataset: str, records: list[dict], tally: Tally) -> list[dict]:
    """The records with the names of their images as they are on disk."""
    # A path such as s3://... is for detectron2's file handlers alone to follow.
    local = [re.match(r"[A-Za-z][\w+.-]*://", os.fspath(r["file_name"])) is None for r in records]
    found = iter(
        drop_missing_images(
            [r for r, is_local in zip(records, local, strict=True) if is_local],
            policy="error",
            tally=tally,
            where=f"dataset {dataset}",
            root=MetadataCatalog.get(dataset).get("image_root"),
            remedy=REMEDY,
        )
    )
    return [next(found) if is_local else r for r, is_local in zip(records, local, strict=True)]


def _has_box(annotation: dict, record: dict, tally: Tally) -> bool:
    """Whether a box is not degenerate; counts it if it is, or if it leaves the image."""
    mode = annotation.get("bbox_mode")
    if mode != BoxMode.XYWH_ABS and mode != BoxMode.XYXY_ABS:
        return True
    try:
        x0, y0, x1, y1 = map(float, annotation["bbox"])
    except (KeyError, TypeError, ValueError):
        tally.add(NO_BOX, _where(record))
        return False
    if mode == BoxMode.XYWH_ABS:
        x1, y1 = x0 + x1, y0 + y1
    width, height = record.get("width", math.inf), record.get("height", math.inf)
    # What `clean_box` would find too, but it takes ten times as long, and COCO has 860 000 boxes.
    if 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height:
        return True
    box, where = [x0, y0, x1, y1], _where(record)
    return clean_box(box, width=width, height=height, tally=tally, where=where) is not None


def _where(record: dict) -> str:
    return f"image {record.get('image_id')} ({record['file_name']})"

"""What stands behind a name in detectron2's catalog, whoever registered it.

This package's readers clean and report a dataset when they register it. A dataset that detectron2
or other code registers ("coco_2017_train") is checked and reported here, when it is first read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import math
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import coco as detectron2_coco
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from omegaconf.errors import OmegaConfBaseException

from ..errors import UserError, first_line
from .coco import UNLISTED, read_registered
from .reader import (
    CLIPPED,
    NO_AREA,
    OUTSIDE,
    DatasetReport,
    Tally,
    clean_box,
    drop_missing_images,
    has_objects,
    refuse_fractions,
    summarise,
)
from .records import clean_records, name_of
from .validation import class_labels, complete_sizes

logger = logging.getLogger(__name__)

REMEDY = (
    "set DETECTRON2_DATASETS to the folder that holds detectron2's datasets, or correct the paths "
    "of one of your own"
)

# What may be wrong with boxes of a json against which is evaluated nevertheless: its numbers stay
# the official ones.
_GEOMETRY = {CLIPPED, NO_AREA, OUTSIDE, UNLISTED}


class _Checked(NamedTuple):
    """What a function of other code registered, ``records`` as bytes for the reason of
    ``reader.register``.
    """

    function: Callable
    records: bytes
    report: DatasetReport


_checked: dict[str, _Checked] = {}
_contents: dict[str, tuple[Any, Content]] = {}


def registered_name(node: Any) -> str:
    """The registered name behind ``dataloader.*.dataset`` of a config.

    The node is a name, a lazy call of one of this package's readers, or detectron2's
    ``get_detection_dataset_dicts(names=...)``, of which the first name is taken.

    Raises:
        UserError: a call of what is not there, or refuses what it is given; or the reader's own.
    """
    if isinstance(node, str):
        return node
    names = node.get("names")
    if names is not None:
        return names if isinstance(names, str) else names[0]
    try:
        return instantiate(node)
    except (TypeError, ValueError, ImportError) as error:
        if isinstance(error, UserError | OmegaConfBaseException):  # Told as what they are.
            raise
        raise UserError(
            f"{node._get_full_key(None) or 'the dataset'} cannot be built: {first_line(error)}: "
            "correct its _target_ or what that is given"
        ) from error


def registered_names(node: Any) -> list[str]:
    """All names behind ``dataloader.train.dataset``, of which Detectron2 joins several."""
    names = None if isinstance(node, str) else node.get("names")
    several = names is not None and not isinstance(names, str)
    return list(names) if several else [registered_name(node)]


class Content(NamedTuple):
    """What tells a dataset from others: a hash of its names and labels, and its files."""

    sha256: str
    files: frozenset[str]


def content_of(dataset: str) -> Content:
    """Of a registered dataset; read once, for of a large one that takes many seconds.

    Raises:
        UserError: as ``dataset_dicts``.
    """
    function = DatasetCatalog.data.get(dataset)
    known = _contents.get(dataset)
    if known is None or known[0] is not function:
        records = dataset_dicts(dataset=dataset, filter_empty=False)
        files = frozenset(os.path.abspath(os.fspath(r["file_name"])) for r in records)
        known = _contents[dataset] = (function, Content(_sha256(records), files))
    return known[1]


def _sha256(records: Iterable[dict]) -> str:
    digest = hashlib.sha256()
    for record in records:
        boxes = [
            (a.get("category_id"), a.get("iscrowd", 0), [float(x) for x in a.get("bbox", ())])
            for a in record.get("annotations", ())
        ]
        # What decides which are small, medium or large.
        areas = [a.get("area") for a in record.get("annotations", ())]
        boxes += [float(area) for area in areas if area is not None]
        name = os.path.basename(str(record.get("file_name")))
        digest.update(repr((record.get("image_id"), name, boxes)).encode())
    return digest.hexdigest()


def dataset_dicts(*, dataset: str, filter_empty: bool = True) -> list[dict]:
    """The records of a registered dataset, in detectron2's format.

    A dataset that none of this package's readers registered is read, checked and reported in the
    log once per process, as those of our readers are, and its values are read by the same rules.
    Its degenerate boxes are left out of the records: detectron2's mapper would drop them without a
    word. A box that leaves its image is counted and left to the mapper, which clips it. Rotated
    boxes need only be finite.

    Args:
        dataset: a registered name.
        filter_empty: leave out images without an annotation that is not a crowd.

    Raises:
        UserError: the name is not registered, its files do not exist or cannot be read, an image
            is missing, a class is unknown, or no image is left.
    """
    if dataset not in DatasetCatalog:
        raise UserError(
            f"dataset {dataset!r} is not registered: use one of dfd.data's readers, a name that "
            "detectron2 registers, such as coco_2017_train, or, in the config, a function of yours "
            "that registers it and returns the name (docs/extending.md)"
        )
    if MetadataCatalog.get(dataset).get("dfd_report") is not None:
        records = DatasetCatalog.get(dataset)
    else:
        if not _is_reported(dataset):
            _check(dataset)
        records = pickle.loads(_checked[dataset].records)
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
    if not _is_reported(dataset):
        dataset_dicts(dataset=dataset, filter_empty=False)
    return _checked[dataset].report


def _is_reported(dataset: str) -> bool:
    """Whether there is a report of what is now registered under a name."""
    known = _checked.get(dataset)
    return known is not None and known.function is DatasetCatalog.data.get(dataset)


def _classes(dataset: str, tally: Tally | None = None) -> list[str]:
    names = MetadataCatalog.get(dataset).get("thing_classes")
    if names is None or not len(names):
        raise UserError(f"dataset {dataset} has no class names: set its metadata's thing_classes")
    return class_labels(names, f"dataset {dataset}", tally)


def _check(dataset: str) -> None:
    """Keep the records, with values that are what they should be and without degenerate boxes."""
    tally = Tally()
    records, ground_truth = _read(dataset, tally)
    classes = _classes(dataset)
    found = _found(dataset, records, tally)
    complete_sizes(found, tally)
    checked = []
    for record in found:
        annotations = record["annotations"]
        kept = [a for a in annotations if _has_box(a, record, tally)]
        checked.append({**record, "annotations": kept} if len(kept) < len(annotations) else record)
    refuse_fractions(checked, f"dataset {dataset}")
    source = MetadataCatalog.get(dataset).get("json_file")
    report = summarise(
        dataset,
        checked,
        classes=classes,
        source=os.fspath(source) if source else "registered by other code",
        images_in_source=len(records),
        tally=tally,
        ground_truth=ground_truth if _GEOMETRY.issuperset(tally.counts) else None,
    )
    content = pickle.dumps(checked, protocol=pickle.HIGHEST_PROTOCOL)
    _checked[dataset] = _Checked(DatasetCatalog[dataset], content, report)
    logger.info("%s", report)


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


def _read(dataset: str, tally: Tally) -> tuple[list[dict], str | None]:
    """The records of a dataset, and a json that pycocotools can use for it, if there is one."""
    path = MetadataCatalog.get(dataset).get("json_file")
    function = DatasetCatalog[dataset]
    if path is not None and getattr(function, "__module__", None) == detectron2_coco.__name__:
        return _read_coco(dataset, path, tally)  # It is register_coco_instances'.
    with _one_line(dataset), _count_lost(tally):
        records = DatasetCatalog.get(dataset)
    records = clean_records(records, f"dataset {dataset}", _classes(dataset, tally), tally)
    return records, path if path is not None and _describes(dataset, path, records) else None


def _read_coco(dataset: str, json_file: Any, tally: Tally) -> tuple[list[dict], str | None]:
    """Reads what ``register_coco_instances`` names; Detectron2's own reader loses what it cannot
    tell, such as the annotations of images whose id is text on one side.
    """
    metadata = MetadataCatalog.get(dataset)
    with _one_line(dataset):
        path = PathManager.get_local_path(os.fspath(json_file))
        root = os.fspath(metadata.get("image_root", ""))
        if not os.path.isfile(path):
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        try:
            records, classes, evaluable = read_registered(path, root, tally)
        except UserError as e:
            raise UserError(f"dataset {dataset} cannot be read ({e})") from e
        metadata.thing_classes = list(classes.values())
        metadata.thing_dataset_id_to_contiguous_id = {c: i for i, c in enumerate(classes)}
    return records, path if evaluable else None


@contextlib.contextmanager
def _one_line(dataset: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as e:
        raise UserError(f"dataset {dataset}: {e.filename} does not exist: {REMEDY}") from e
    except Exception as e:  # Other code reads it, and may fail in any way.
        raise UserError(
            f"dataset {dataset} cannot be read ({type(e).__name__}: {first_line(e)}): correct its "
            "annotations"
        ) from e


def _describes(dataset: str, path: str, records: list[dict]) -> bool:
    """Whether a json that other code names holds what these records do, and pycocotools can use it.

    Images, classes, and the boxes of every image: records that a function has filtered, merged or
    corrected are other data.
    """
    tally, metadata = Tally(), MetadataCatalog.get(dataset)
    try:
        path = PathManager.get_local_path(os.fspath(path))
        images, classes, evaluable = read_registered(path, "", tally, sizes=False)
    except (UserError, OSError, TypeError):
        return False
    ids = {category: i for i, category in enumerate(classes)}
    same = metadata.get("thing_dataset_id_to_contiguous_id") == ids
    same = same and list(metadata.thing_classes) == list(classes.values())
    same = same and _boxes_of_images(images) == _boxes_of_images(records)
    return evaluable and same and _GEOMETRY >= set(tally.counts)


def _boxes_of_images(records: list[dict]) -> dict[Any, list[tuple]]:
    """Class, crowd flag and box of every annotation, by image, whatever their order."""
    return {
        record["image_id"]: sorted(
            (
                a["category_id"],
                a.get("iscrowd", 0),
                *(
                    round(v, 2)
                    for v in BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS)
                ),
            )
            for a in record["annotations"]
        )
        for record in records
    }


@contextlib.contextmanager
def _count_lost(tally: Tally) -> Iterator[None]:
    """Counts the annotations that ``load_coco_json`` leaves out, of which it only warns."""

    def count(record: logging.LogRecord) -> bool:
        found = re.search(r"contains (\d+) annotations, but only (\d+)", record.getMessage())
        if found:
            for _ in range(int(found[1]) - int(found[2])):
                tally.add(UNLISTED, "see Detectron2's warning")
        return True

    source = logging.getLogger(detectron2_coco.__name__)
    source.addFilter(count)
    try:
        yield
    finally:
        source.removeFilter(count)


def _has_box(annotation: dict, record: dict, tally: Tally) -> bool:
    """Whether a box is not degenerate; counts it if it is, or if it leaves the image."""
    mode, box = annotation["bbox_mode"], annotation["bbox"]
    if mode != BoxMode.XYWH_ABS and mode != BoxMode.XYXY_ABS:
        return True
    x0, y0, x1, y1 = box
    if mode == BoxMode.XYWH_ABS:
        x1, y1 = x0 + x1, y0 + y1
    box = clean_box(
        [x0, y0, x1, y1],
        width=record.get("width", math.inf),
        height=record.get("height", math.inf),
        tally=tally,
        where=lambda: name_of(record),
    )
    return box is not None

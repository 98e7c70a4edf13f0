"""Whether the mapper of a loader can make the labels of a dataset, and what it cannot use."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import detectron2.data.transforms as T

from ..errors import UserError
from .reader import has_objects
from .records import name_of

logger = logging.getLogger(__name__)


def fit_to_mapper(
    records: list[dict], mapper: Any, dataset: str, *, filter_empty: bool
) -> list[dict]:
    """The records as a ``DatasetMapper`` can use them; those of another mapper stay as they are.

    With masks, objects without one are left out and the log counts them: Detectron2 looks at the
    first object of an image and takes the others for alike. If no object has one, all stay. With
    keypoints, objects without any have none that is labelled.

    Args:
        mapper: with ``use_instance_mask``, ``instance_mask_format`` and ``use_keypoint``.
        filter_empty: leave out images that have no object left.

    Raises:
        UserError: run-length masks are to be polygons, or the keypoints are not as many everywhere
            or cannot be flipped.
    """
    if getattr(mapper, "use_instance_mask", False):
        if getattr(mapper, "instance_mask_format", None) == "polygon":
            _refuse_run_lengths(records, dataset)
        records = _with_masks(records, dataset, filter_empty)
    if getattr(mapper, "use_keypoint", False):
        records = _with_keypoints(records, mapper, dataset)
    return records


def _objects(record: dict) -> list[dict]:
    return [a for a in record["annotations"] if not a.get("iscrowd", 0)]


def _refuse_run_lengths(records: list[dict], dataset: str) -> None:
    found = [r for r in records for a in _objects(r) if isinstance(a.get("segmentation"), dict)]
    if found:
        raise UserError(
            f"dataset {dataset}: {len(found)} masks are run lengths, e.g. in {name_of(found[0])}, "
            "which cannot become polygons exactly: set "
            "dataloader.train.mapper.instance_mask_format=bitmask"
        )


def _with_masks(records: list[dict], dataset: str, filter_empty: bool) -> list[dict]:
    lacking = [(r, a) for r in records for a in _objects(r) if "segmentation" not in a]
    if not lacking or len(lacking) == sum(len(_objects(r)) for r in records):
        return records
    logger.warning(
        "dataset %s: objects dropped, without the mask that the mapper is to make: %d, e.g. in %s",
        dataset,
        len(lacking),
        name_of(lacking[0][0]),
    )
    records = [
        {
            **record,
            "annotations": [
                a for a in record["annotations"] if a.get("iscrowd", 0) or "segmentation" in a
            ],
        }
        for record in records
    ]
    return [r for r in records if has_objects(r)] if filter_empty else records


def _with_keypoints(records: list[dict], mapper: Any, dataset: str) -> list[dict]:
    lengths = {len(a["keypoints"]) // 3 for r in records for a in _objects(r) if "keypoints" in a}
    if not lengths:
        return records
    if len(lengths) > 1:
        raise UserError(
            f"dataset {dataset} has annotations of {' and of '.join(map(str, sorted(lengths)))} "
            "keypoints: a mapper with use_keypoint needs the same number everywhere"
        )
    (length,) = lengths
    flips = getattr(mapper, "keypoint_hflip_indices", None)
    augmentations = getattr(getattr(mapper, "augmentations", None), "augs", ())
    if _flips(augmentations) and (flips is None or len(flips) != length):
        raise UserError(
            f"dataset {dataset} has {length} keypoints, which cannot be flipped: set "
            "keypoint_hflip_indices of dataloader.train.mapper to the point that each becomes, or "
            "leave out RandomFlip"
        )
    unlabelled = [0.0] * (3 * length)
    return [
        {
            **record,
            "annotations": [
                a if "keypoints" in a else {**a, "keypoints": list(unlabelled)}
                for a in record["annotations"]
            ],
        }
        for record in records
    ]


def _flips(augmentations: Sequence[Any]) -> bool:
    return any(
        isinstance(a, T.RandomFlip) and getattr(a, "horizontal", True) or _flips(_inner(a))
        for a in augmentations
    )


def _inner(augmentation: Any) -> Sequence[Any]:
    """Those that an augmentation applies."""
    if isinstance(augmentation, T.RandomApply):
        return [augmentation.aug]
    return getattr(augmentation, "augs", ())

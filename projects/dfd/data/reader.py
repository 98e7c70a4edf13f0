"""What every dataset reader shares: cleaning of boxes, subsets, the report and registration.

A reader turns its files into detectron2 dataset dicts, counts what it left out in a `Tally`, and
hands both to `register`, which logs a `DatasetReport` and enters the dataset under a name that
depends on nothing but the reader's arguments.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import UserError
from .image_files import ImageFiles
from .numbers import as_whole

logger = logging.getLogger(__name__)

# Pixels. A thinner box has no area in float32, or after it is resized.
_LEAST_SIDE = 1e-3
# COCO writes coordinates with two decimals, so a box may pass the border by a rounding error.
ROUNDING = 0.1

CLIPPED = "boxes clipped to the image"
NO_AREA = "boxes dropped, without area"
OUTSIDE = "boxes dropped, outside the image"
IMAGE_AGAIN = "images listed again, under another id"
BOX_AGAIN = "annotations given again, of the same class and box"
NO_BOX = "annotations dropped, without four box numbers"


@dataclass
class Tally:
    """Counts of things left out or changed, each with its first example."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, example: str | Callable[[], str]) -> None:
        """Counts one; a function gives the example only where it is the first."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if kind not in self.examples:
            self.examples[kind] = example() if callable(example) else example


@dataclass(frozen=True)
class DatasetReport:
    """What a registered dataset holds and what was left out of its source.

    Attributes:
        name: the registered name.
        source: the json file or folder that it was read from.
        images: images in the dataset, after drops and the subset.
        images_in_source: images listed by the source.
        images_without_objects: images without an annotation, crowds not counted.
        instances: instances per class name, crowds not counted, in the order of the class ids.
        crowds: annotations with ``iscrowd=1``.
        difficult: annotations that a VOC file marks as difficult (they are kept as ordinary ones).
        dropped: count of each kind of thing dropped, clipped or converted.
        examples: one example of each kind in ``dropped``.
        ground_truth: the COCO json to evaluate with, or None if there is none that pycocotools can
            use for what the dataset holds, and one must be written.
        masks: annotations with a mask.
        keypoints: annotations with keypoints, by how many keypoints those are.
    """

    name: str
    source: str
    images: int
    images_in_source: int
    images_without_objects: int
    instances: dict[str, int]
    crowds: int
    difficult: int
    dropped: dict[str, int]
    examples: dict[str, str]
    ground_truth: str | None
    masks: int = 0
    keypoints: dict[int, int] = field(default_factory=dict)

    @property
    def annotations(self) -> int:
        """Annotations in the dataset, crowds included."""
        return sum(self.instances.values()) + self.crowds

    def __str__(self) -> str:
        classes = ", ".join(f"{name} {count}" for name, count in self.instances.items())
        lines = [
            f"dataset {self.name}",
            f"  source       {self.source}",
            f"  images       {self.images} of {self.images_in_source} listed, "
            f"{self.images_without_objects} without objects",
            f"  annotations  {self.annotations}, of them {self.crowds} crowds"
            + (f", {self.difficult} difficult" if self.difficult else ""),
            f"  classes      {len(self.instances)}: {classes}",
        ]
        for kind, count in self.dropped.items():
            lines.append(f"  {kind}: {count}, e.g. {self.examples[kind]}")
        if not self.dropped:
            lines.append("  nothing dropped or clipped")
        return "\n".join(lines)


def dataset_name(stem: str, *, num_images: int | None = None, **arguments: Any) -> str:
    """A readable, filesystem-safe name that is the same for the same arguments in any process."""
    key = json.dumps({**arguments, "num_images": num_images}, sort_keys=True)
    subset = "" if num_images is None else f"_n{num_images}"
    return f"{_file_safe(stem)}{subset}-{_digest(key)}"


def file_stem(dataset: str) -> str:
    """The name of a file of a dataset, whatever the name that other code has registered."""
    safe = _file_safe(dataset)
    return safe if safe == dataset else f"{safe}-{_digest(dataset)}"


def _file_safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")[:100] or "dataset"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def checked_path(reader: str, argument: str, value: str, what: str) -> str:
    """The absolute path of a required path argument; an empty one is a `UserError`."""
    if not value:
        raise UserError(
            f"{reader}: {argument} is empty: set dataloader.train.dataset.{argument} or "
            f"dataloader.test.dataset.{argument} to {what}"
        )
    return os.path.abspath(os.path.expanduser(os.fspath(value)))


def checked_subset(reader: str, num_images: Any, subset_seed: Any) -> tuple[int | None, int]:
    """``num_images`` and ``subset_seed`` as whole numbers.

    Raises:
        UserError: one of them is none, or the seed is negative.
    """
    count, seed = as_whole(num_images), as_whole(subset_seed)
    if count is None and num_images is not None:
        raise UserError(f"{reader}: num_images={num_images!r}: it must be a whole number, or null")
    if seed is None or seed < 0:
        raise UserError(f"{reader}: subset_seed={subset_seed!r}: it must be 0 or more")
    return count, seed


def clean_box(
    box: Sequence[float],
    *,
    width: float,
    height: float,
    tally: Tally,
    where: str | Callable[[], str],
) -> list[float] | None:
    """Clips a box to its image, or drops it if nothing of it is left, and counts either.

    Args:
        box: x0, y0, x1, y1 in pixels, with x1 and y1 exclusive.
        width, height: size of the image in pixels.
        tally: counts the box if it is dropped or loses more than `ROUNDING` pixels.
        where: names the annotation in the tally's example.

    Returns:
        x0, y0, x1, y1 within [0, width] and [0, height], or None.
    """
    x0, y0, x1, y1 = box
    # What follows would find the same, but COCO has 860 000 boxes.
    wide = x1 - x0 >= _LEAST_SIDE and y1 - y0 >= _LEAST_SIDE
    if wide and 0 <= x0 and x1 <= width < math.inf and 0 <= y0 and y1 <= height < math.inf:
        return [x0, y0, x1, y1]

    def example() -> str:
        named = where() if callable(where) else where
        return f"{named}, box {_brief(box)} in a {width}x{height} image"

    if not all(math.isfinite(v) for v in box):
        tally.add("boxes dropped, not finite", example)
        return None
    if not wide:
        tally.add(NO_AREA, example)
        return None
    clipped = [max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))]
    if clipped[2] - clipped[0] < _LEAST_SIDE or clipped[3] - clipped[1] < _LEAST_SIDE:
        tally.add(OUTSIDE, example)
        return None
    if max(abs(a - b) for a, b in zip(clipped, box, strict=True)) > ROUNDING:
        tally.add(CLIPPED, example)
    return clipped


def _brief(box: Sequence[float]) -> str:
    return f"{_numbers(box)} (x0, y0, x1, y1)"


def _numbers(box: Sequence[float]) -> str:
    return "[" + ", ".join(f"{v:g}" for v in box) + "]"


def drop_missing_images(
    records: list[dict],
    *,
    policy: str,
    tally: Tally,
    where: str,
    root: str | os.PathLike | None = None,
    exact: bool = False,
    remedy: str = "correct the path, or set missing_images=drop",
) -> list[dict]:
    """The records whose image file exists, with its name as it is on disk.

    Args:
        policy: with "error" a missing image is fatal, with "drop" it is counted.
        tally: also counts the images that are found under another spelling than the one given.
        root: the folder that names are relative to, if there is one.
        exact: do not look for other spellings.

    Raises:
        UserError: see ``policy``; or a name may be one of several files.
    """
    files = ImageFiles(root)
    kept, missing = [], []
    respelt: dict[str, str] = {}
    for record in records:
        given = os.fspath(record["file_name"])
        if files.exists(given):
            kept.append(record if given is record["file_name"] else {**record, "file_name": given})
            continue
        found = None if exact else files.find(given)
        if found is None:
            missing.append(given)
            continue
        file_name, kind = found
        _check_one_name(respelt.setdefault(file_name, given), given, file_name, where)
        tally.add(kind, f"{given} as {file_name}")
        kept.append({**record, "file_name": file_name})
    for record in records if respelt else ():
        given = os.fspath(record["file_name"])
        file_name = os.path.normpath(given)
        if file_name in respelt and files.exists(given):
            _check_one_name(respelt[file_name], given, file_name, where)
    for given in missing:
        if files.listing(os.path.dirname(given)).closed:
            raise UserError(f"the folder of image {given} may not be listed: make it readable")
    if missing and policy == "error":
        raise UserError(
            f"{len(missing)} of {len(records)} images listed in {where} are missing on disk, e.g. "
            f"{missing[0]}: {remedy}"
        )
    for given in missing:
        tally.add("images dropped, missing on disk", given)
    return kept


def _check_one_name(first: str, second: str, file_name: str, where: str) -> None:
    if first != second:
        raise UserError(
            f"{where}: images {first} and {second} would both be {file_name}: correct their names"
        )


def has_objects(record: dict) -> bool:
    """Whether an image has an annotation that is not a crowd."""
    return any(not a.get("iscrowd", 0) for a in record.get("annotations", ()))


def subset(
    records: list[dict], *, num_images: int | None, subset_seed: int, where: str
) -> list[dict]:
    """``num_images`` of the images that have objects, in their original order.

    The images are the first ones of a permutation drawn from ``subset_seed``, so a smaller subset
    is contained in every larger one of the same seed.

    Raises:
        UserError: ``num_images`` is below 1 or above the number of images with objects.
    """
    if num_images is None:
        return records
    candidates = [r for r in records if has_objects(r)]
    if not 1 <= num_images <= len(candidates):
        raise UserError(
            f"num_images={num_images}, but {where} has {len(candidates)} images with objects: "
            f"choose a number from 1 to {len(candidates)}, or null for all images"
        )
    order = np.random.default_rng(subset_seed).permutation(len(candidates))
    return [candidates[i] for i in sorted(order[:num_images].tolist())]


def summarise(
    name: str,
    records: list[dict],
    *,
    classes: Sequence[str],
    source: str,
    images_in_source: int,
    tally: Tally,
    difficult: int = 0,
    ground_truth: str | None = None,
) -> DatasetReport:
    """The report of a dataset; the arguments are those of `register`."""
    _count_repeats(records, tally)
    counts = [0] * len(classes)
    crowds = masks = 0
    keypoints: dict[int, int] = {}
    for record in records:
        for annotation in record.get("annotations", ()):
            if annotation.get("iscrowd", 0):
                crowds += 1
            else:
                counts[annotation["category_id"]] += 1
            masks += "segmentation" in annotation
            if "keypoints" in annotation:
                number = len(annotation["keypoints"]) // 3
                keypoints[number] = keypoints.get(number, 0) + 1
    return DatasetReport(
        name=name,
        source=source,
        images=len(records),
        images_in_source=images_in_source,
        images_without_objects=sum(not has_objects(r) for r in records),
        instances=dict(zip(classes, counts, strict=True)),
        crowds=crowds,
        difficult=difficult,
        dropped=dict(tally.counts),
        examples=dict(tally.examples),
        ground_truth=ground_truth,
        masks=masks,
        keypoints=keypoints,
    )


def _count_repeats(records: list[dict], tally: Tally) -> None:
    """Count what stands there twice, which merging of files leaves: it is kept, but told.

    A second box of one object can be found by no detection; an image that is listed twice, with
    part of the objects each time, has the others for background.
    """
    ids: dict[str, Any] = {}
    for record in records:
        name, number = os.fspath(record["file_name"]), record.get("image_id")
        if ids.setdefault(name, number) != number:
            tally.add(IMAGE_AGAIN, f"{name} as {ids[name]} and as {number}")
        boxes = set()
        for annotation in record.get("annotations", ()):
            box = (annotation.get("category_id"), *annotation["bbox"])
            if box in boxes:
                tally.add(BOX_AGAIN, f"{_numbers(annotation['bbox'])} of {name}")
            boxes.add(box)


def refuse_fractions(records: list[dict], where: str) -> None:
    """
    Raises:
        UserError: no box leaves the first pixel: they are in fractions of their images.
    """
    boxes = [a["bbox"] for record in records for a in record.get("annotations", ())]
    if boxes and all(len(box) == 4 and 0 <= min(box) and max(box) <= 1 for box in boxes):
        raise UserError(
            f"{where}: no box reaches beyond the first pixel of its image, e.g. "
            f"{_numbers(boxes[0])}: write boxes in pixels, not in fractions of the image"
        )


def register(
    name: str,
    records: list[dict],
    *,
    classes: Sequence[str],
    category_ids: Sequence[int],
    source: str,
    images_in_source: int,
    tally: Tally,
    difficult: int = 0,
    ground_truth: str | None = None,
) -> str:
    """Enters a dataset in detectron2's catalogs, logs its report, and returns its name.

    Args:
        records: detectron2 dataset dicts.
        classes: class names; position is the contiguous class id in the records.
        category_ids: the id of each class in the source.
        ground_truth: a COCO json with exactly the content of ``records``, if there is one.

    Raises:
        UserError: ``records`` is empty, or all boxes are in fractions of their images.
    """
    if not records:
        left_out = "; ".join(f"{k}: {n}" for k, n in tally.counts.items())
        raise UserError(f"{source} holds no images{f' ({left_out})' if left_out else ''}")
    refuse_fractions(records, source)
    report = summarise(
        name,
        records,
        classes=classes,
        source=source,
        images_in_source=images_in_source,
        tally=tally,
        difficult=difficult,
        ground_truth=ground_truth,
    )
    # Bytes take a fraction of the memory of the dicts, and every caller gets a copy of its own.
    data = pickle.dumps(records, protocol=pickle.HIGHEST_PROTOCOL)
    DatasetCatalog.register(name, lambda: pickle.loads(data))
    metadata = MetadataCatalog.get(name)
    metadata.set(
        thing_classes=list(classes),
        thing_dataset_id_to_contiguous_id={c: i for i, c in enumerate(category_ids)},
        evaluator_type="coco",
        dfd_report=report,
    )
    if ground_truth is not None:
        metadata.json_file = ground_truth
    logger.info("%s", report)
    return name

"""A generated detection dataset of shapes: needs no download, and is not trivial to learn.

This module writes the dataset and registers it; `dfd.demo.drawing` draws the images.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from typing import Any

import cv2

from ..data.coco import coco_json
from ..data.reader import checked_path
from ..errors import UserError
from ..ranges import check_choice, check_count, check_probability
from .drawing import SHAPE_CLASSES, SPLITS, VERSION, draw_image

logger = logging.getLogger(__name__)

_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 95]


def generated_shapes(
    *,
    root: str,
    split: str,
    num_train: int,
    num_val: int,
    image_size: int,
    seed: int,
    clutter: float = 1.0,
    classes: Sequence[str] | None = None,
    num_images: int | None = None,
    subset_seed: int = 0,
) -> str:
    """Registers one split of a dataset of shapes, which is written to ``root`` if it is not there.

    ``root`` gets ``train.json`` and ``val.json`` in COCO form, the folders ``train`` and ``val``
    with JPEG images, and ``spec.json`` with the arguments. Everything is written beside ``root``
    and renamed at the end, so a killed run leaves no half of a dataset in ``root``.

    Boxes, polygons and areas are those of the whole shape within the image, also where another
    object covers it; at least half of every object is visible. Image ``i`` of a split depends on
    ``(seed, split, i)`` alone: a larger ``num_train`` only appends images.

    Args:
        root: folder of the dataset.
        split: "train" or "val".
        num_train, num_val: images per split, at least 1.
        image_size: width and height of the images in pixels, at least 32.
        seed: seed of the drawing, at least 0.
        clutter: how hard the images are, from 0 (few distractors, no small objects, little overlap,
            calm backgrounds) to 1.
        classes: some of `SHAPE_CLASSES`, in the order of the class ids; None takes all of them.
        num_images, subset_seed: as for `coco_json`.

    Returns:
        The registered name.

    Raises:
        UserError: an argument is out of range, or ``root`` exists and was not made with the same
            arguments. It is never overwritten.
    """
    folder = checked_path("generated_shapes", "root", root, "the folder to write the dataset to")
    check_choice("generated_shapes: split", split, SPLITS)
    spec = {
        "version": VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "image_size": image_size,
        "seed": seed,
        "clutter": clutter,
    }
    for key, least in (("num_train", 1), ("num_val", 1), ("image_size", 32), ("seed", 0)):
        check_count(f"generated_shapes: {key}", spec[key], least)
    check_probability("generated_shapes: clutter", clutter)
    names = list(SHAPE_CLASSES if classes is None else classes)
    if not names or len(set(names)) < len(names) or not set(names) <= set(SHAPE_CLASSES):
        raise UserError(
            f"generated_shapes: classes={names} must be different ones of "
            f"{', '.join(SHAPE_CLASSES)}"
        )
    if names != list(SHAPE_CLASSES):
        # Folders with all of them may have been made before there was a choice.
        spec["classes"] = names
    if not _exists(folder, spec):
        _write(folder, spec)
    return coco_json(
        json=os.path.join(folder, f"{split}.json"),
        images=os.path.join(folder, split),
        num_images=num_images,
        subset_seed=subset_seed,
    )


# A dry run sends it elsewhere.
generated_shapes.writes_to = "root"


def _exists(folder: str, spec: dict[str, Any]) -> bool:
    """Whether ``folder`` already holds this very dataset; anything else in its place is fatal."""
    if not os.path.lexists(folder) or (os.path.isdir(folder) and not os.listdir(folder)):
        return False
    try:
        with open(os.path.join(folder, "spec.json"), encoding="utf-8") as f:
            found = json.load(f)
    except (OSError, ValueError) as e:
        raise UserError(
            f"{folder} exists and is not a generated dataset: choose another root"
        ) from e
    if found != spec:
        raise UserError(
            f"{folder} was made with {found}, not with {spec}: choose another root, or delete it"
        )
    return True


def _write(folder: str, spec: dict[str, Any]) -> None:
    partial = f"{folder}.partial-{uuid.uuid4().hex[:8]}"
    try:
        for split in SPLITS:
            _write_split(partial, split, spec)
        with open(os.path.join(partial, "spec.json"), "w", encoding="utf-8") as f:
            json.dump(spec, f, indent=1)
        try:
            os.rename(partial, folder)
        except OSError:
            # Another process of the same run was first; what it wrote is the same.
            if not _exists(folder, spec):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_split(folder: str, split: str, spec: dict[str, Any]) -> None:
    os.makedirs(os.path.join(folder, split))
    size, number = spec["image_size"], spec[f"num_{split}"]
    classes = spec.get("classes", SHAPE_CLASSES)
    images, annotations = [], []
    start = time.perf_counter()
    for index in range(number):
        image, objects = draw_image(
            seed=spec["seed"],
            split=split,
            index=index,
            size=size,
            clutter=spec["clutter"],
            classes=classes,
        )
        file = f"{index:06d}.jpg"
        if not cv2.imwrite(os.path.join(folder, split, file), image, _JPEG):
            raise UserError(f"cannot write {os.path.join(folder, split, file)}: free some space")
        images.append({"id": index + 1, "file_name": file, "width": size, "height": size})
        for annotation in objects:
            annotation.update(id=len(annotations) + 1, image_id=index + 1, iscrowd=0)
            annotations.append(annotation)
        if (index + 1) % 500 == 0 or index + 1 == number:
            rate = (index + 1) / (time.perf_counter() - start)
            logger.info("drew %d of %d %s images (%.0f/s)", index + 1, number, split, rate)
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    with open(os.path.join(folder, f"{split}.json"), "w", encoding="utf-8") as f:
        json.dump(content, f)

"""What runs detect on the same test images, and pictures of it."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from ..data import dataset_dicts
from ..data.images import upright_name
from ..errors import UserError
from ..weights.strict import load_strict, read_weights
from .run_folder import RunFolder

SCORE_THRESHOLD = 0.3
# Longest side of a picture in pixels: small images are enlarged until a label can be read.
_SMALL, _LARGE = 360, 800
# Distinct on light and dark images; repeated for more classes.
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324")


@dataclass(frozen=True)
class Boxes:
    """Boxes on one image: (M,4) XYXY pixels of the original image, class ids, scores or None."""

    boxes: np.ndarray
    classes: list[int]
    scores: list[float] | None = None


def compare_detections(
    runs: Sequence[RunFolder], num_images: int
) -> list[tuple[str, dict[str, Boxes]]]:
    """What every run finds on the same, evenly spaced test images.

    Returns:
        For each image the name to read it by, and the ground truth and each run's detections by
        name.

    Raises:
        UserError: the test data cannot be read, or a checkpoint does not fit its config.
    """
    if num_images < 0:
        raise UserError(f"--num-images {num_images}: it must be 0 or more")
    records = dataset_dicts(dataset=runs[0].test_dataset(), filter_empty=False)
    count = min(num_images, len(records))
    if count == 0:
        return []
    indices = [int((i + 0.5) * len(records) / count) for i in range(count)]
    chosen = [records[index] for index in indices]
    columns = {"ground truth": [_ground_truth(record) for record in chosen]}
    columns |= {run.name: _detect(run, indices) for run in runs}
    return [
        (upright_name(record), {name: boxes[i] for name, boxes in columns.items()})
        for i, record in enumerate(chosen)
    ]


def _ground_truth(record: Mapping[str, Any]) -> Boxes:
    objects = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
    boxes = [BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    return Boxes(np.array(boxes).reshape(-1, 4), [a["category_id"] for a in objects])


@torch.no_grad()
def _detect(run: RunFolder, indices: Sequence[int]) -> list[Boxes]:
    device = run.cfg.train.device if torch.cuda.is_available() else "cpu"
    model = instantiate(run.student).to(device).eval()
    weights = read_weights(os.path.join(run.folder, "model_final.pth"), f"--run {run.name}")
    load_strict(model, weights, f"--run {run.name}")
    # Straight from the data set: the loader itself would read every image before these.
    dataset = instantiate(run.cfg.dataloader.test).dataset
    found = []
    for index in indices:
        instances = model([dataset[index]])[0]["instances"].to("cpu")
        instances = instances[instances.scores >= SCORE_THRESHOLD]
        boxes = instances.pred_boxes.tensor.numpy()
        found.append(Boxes(boxes, instances.pred_classes.tolist(), instances.scores.tolist()))
    return found


def draw_boxes(file_name: str, boxes: Boxes, classes: Sequence[str]) -> bytes:
    """A JPEG of an image with boxes, class names and scores, scaled to a legible size."""
    image = read_image(file_name, "RGB")
    longest = max(image.shape[:2])
    scale = _LARGE / longest if longest > _LARGE else math.ceil(_SMALL / longest)
    labels = [classes[c] for c in boxes.classes]
    if boxes.scores is not None:
        labels = [f"{name} {score:.2f}" for name, score in zip(labels, boxes.scores, strict=True)]
    colours = [_COLOURS[c % len(_COLOURS)] for c in boxes.classes]
    drawn = Visualizer(image, scale=scale).overlay_instances(
        boxes=boxes.boxes, labels=labels, assigned_colors=colours
    )
    out = io.BytesIO()
    Image.fromarray(drawn.get_image()).save(out, "JPEG", quality=90)
    return out.getvalue()

"""What runs detect on the same test images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.structures import BoxMode

from ..data import dataset_dicts
from ..data.images import upright_name
from ..deploy import load_detector
from ..deploy.draw import Boxes
from ..deploy.inputs import evenly_spaced
from ..engine.run_folder import RunFolder
from ..errors import UserError

SCORE_THRESHOLD = 0.3


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
    indices = evenly_spaced(len(records), num_images)
    if not indices:
        return []
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
    model, _ = load_detector(run)
    # Straight from the data set: the loader itself would read every image before these.
    dataset = instantiate(run.cfg.dataloader.test).dataset
    found = []
    for index in indices:
        instances = model([dataset[index]])[0]["instances"].to("cpu")
        instances = instances[instances.scores >= SCORE_THRESHOLD]
        boxes = instances.pred_boxes.tensor.numpy()
        found.append(Boxes(boxes, instances.pred_classes.tolist(), instances.scores.tolist()))
    return found

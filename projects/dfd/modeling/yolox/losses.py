"""YOLOX's losses.

Shape shorthand: N images, A cells of all levels, P positive cells of the batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .assign import simota
from .head import Grid, Predictions, decode

IOU_WEIGHT = 5.0
# A side of 1e13 strides: no box that anybody could mean.
_LARGEST_LOG_SIDE = 30.0


class Objects(NamedTuple):
    """The objects of one image."""

    boxes: Tensor  # (M,4) float32: centre x, y, width, height, pixels
    classes: Tensor  # (M,) int64


class Targets(NamedTuple):
    """What the positive cells of a batch are to predict."""

    image: Tensor  # (P,) int64
    cell: Tensor  # (P,) int64
    boxes: Tensor  # (P,4): centre x, y, width, height, pixels
    classes: Tensor  # (P,) int64
    iou: Tensor  # (P,) of the predicted box with it


@torch.no_grad()
def match(
    predictions: Predictions, boxes: Tensor, grid: Grid, objects: Sequence[Objects], form: str
) -> Targets:
    """SimOTA over the images of a batch; ``boxes`` are decoded."""
    centres = grid.centres
    matches = [
        simota(classes, objectness, box, *found, centres, grid.strides, form)
        for classes, objectness, box, found in zip(
            predictions.classes, predictions.objectness, boxes, objects, strict=True
        )
    ]
    matched = torch.stack([m.matched_gt for m in matches])
    image, cell = (matched >= 0).nonzero(as_tuple=True)
    iou = torch.stack([m.matched_iou for m in matches])[image, cell]
    # Objects of all images in a row: an image's begin after those of the images before it.
    starts = [0, *accumulate(len(found.classes) for found in objects)][:-1]
    gt = matched[image, cell] + torch.tensor(starts, device=image.device)[image]
    gt_boxes = torch.cat([found.boxes for found in objects])
    gt_classes = torch.cat([found.classes for found in objects])
    return Targets(image, cell, gt_boxes[gt], gt_classes[gt], iou)


def yolox_losses(
    predictions: Predictions,
    grid: Grid,
    objects: Sequence[Objects],
    *,
    divisor: Callable[[Tensor], Tensor],
    form: str = "main",
    l1: bool = False,
) -> dict[str, Tensor]:
    """
    Five times 1 - IoU^2 and the classes' cross entropy with IoU as the target, over the positive
    cells; the objectness's cross entropy over all cells; and ``l1``, the absolute error of the raw
    regression. All are sums, divided by ``divisor`` of the number of positives. A batch without
    objects has the objectness loss; the others are 0, and still depend on every output.

    Args:
        objects: of each image.
        divisor: of the number of positives, a scalar tensor, what the sums are divided by.
        form: of SimOTA.
        l1: whether ``loss_l1`` is asked for.

    Returns:
        ``loss_iou``, ``loss_obj``, ``loss_cls`` and, if asked for, ``loss_l1``.
    """
    with torch.autocast(predictions.objectness.device.type, enabled=False):
        regression, objectness = predictions.regression.float(), predictions.objectness.float()
        boxes = decode(_bounded(regression), grid)
        targets = match(predictions, boxes, grid, objects, form)
        image, cell = targets.image, targets.cell
        is_object = torch.zeros_like(objectness)
        is_object[image, cell] = 1.0
        class_logits = predictions.classes[image, cell].float()
        class_target = torch.zeros_like(class_logits)
        class_target.scatter_(1, targets.classes[:, None], targets.iou[:, None])
        losses = {
            "loss_iou": IOU_WEIGHT * iou_loss(boxes[image, cell], targets.boxes),
            "loss_obj": _cross_entropy(objectness, is_object),
            "loss_cls": _cross_entropy(class_logits, class_target),
        }
        if l1:
            target = encode(targets.boxes, grid, cell)
            losses["loss_l1"] = (regression[image, cell] - target).abs().sum()
        by = divisor(torch.tensor(float(len(image)), device=image.device))
        return {name: loss / by for name, loss in losses.items()}


def _bounded(regression: Tensor) -> Tensor:
    """With sides whose product is a float32 still, or the gradient of the IoU would be NaN."""
    centres, sides = regression.split(2, dim=-1)
    return torch.cat([centres, sides.clamp(max=_LARGEST_LOG_SIDE)], dim=-1)


def iou_loss(boxes: Tensor, target: Tensor) -> Tensor:
    """The sum of 1 - IoU^2 over pairs (P,4) of centre x, y, width, height."""
    low = torch.maximum(boxes[:, :2] - boxes[:, 2:] / 2, target[:, :2] - target[:, 2:] / 2)
    high = torch.minimum(boxes[:, :2] + boxes[:, 2:] / 2, target[:, :2] + target[:, 2:] / 2)
    common = (high - low).prod(1) * (low < high).all(1)
    union = boxes[:, 2:].prod(1) + target[:, 2:].prod(1) - common
    return (1 - (common / (union + 1e-16)) ** 2).sum()


def encode(boxes: Tensor, grid: Grid, cell: Tensor) -> Tensor:
    """The raw regression (P,4) with which these cells would predict these boxes."""
    strides = grid.strides[cell, None]
    centres = boxes[:, :2] / strides - grid.cells[cell]
    return torch.cat([centres, torch.log(boxes[:, 2:] / strides + 1e-8)], dim=1)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target, reduction="sum")

"""Which object a cell, or the box of a cell, is trained for.

Both work on all objects at once and do not wait for the device. Shape shorthand: A cells of all
levels, M objects.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

from ...errors import UserError
from ...ranges import check_count
from .points import at_least_float32

NONE, BACKGROUND, IGNORED = -1, -1, -2
_SMALLEST_SIDE = 1e-6


def check_overlaps(positive: float, negative: float) -> None:
    if not 0 <= negative <= positive:
        raise UserError(
            f"RepPoints: negative_iou is {negative} and positive_iou {positive}; the first must "
            "not be below 0 nor above the second"
        )


@torch.no_grad()
def assign_points(
    points: Tensor,
    gt_boxes: Tensor,
    scale: float = 4,
    num_pos: int = 1,
    valid: Tensor | None = None,
) -> Tensor:
    """Give each object the nearest cells of the level that suits its size.

    The level's stride is about 1/``scale`` of the object's size. Distances are counted in widths
    and heights of the object. A cell that is wanted by several objects goes to the nearest, among
    equals to the first; the others get no cell instead.

    Args:
        points: (A,3) x and y in pixels, and the stride.
        gt_boxes: (M,4) XYXY in pixels.
        num_pos: cells of each object.
        valid: (A,) bool, the cells that may be taken; None: all.

    Returns:
        (A,) int64: index of the object, -1 for none.

    Raises:
        UserError: ``num_pos`` is no integer above 0.
    """
    check_count("assign_points: num_pos", num_pos, 1)
    if not len(gt_boxes) or not len(points):
        return points.new_full((len(points),), NONE, dtype=torch.int64)
    points = at_least_float32(points)
    gt_boxes = gt_boxes.to(points.dtype)
    centers = (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2
    sides = (gt_boxes[:, 2:] - gt_boxes[:, :2]).clamp(min=_SMALLEST_SIDE)
    levels = points[:, 2].log2().int()
    wanted = ((sides / scale).log2().sum(dim=1) / 2).int()
    wanted = torch.minimum(torch.maximum(wanted, levels.min()), levels.max())
    distances = ((points[:, None, :2] - centers) / sides).norm(dim=2)  # (A,M)
    eligible = levels[:, None] == wanted
    if valid is not None:
        eligible &= valid[:, None]
    distances = distances.masked_fill(~eligible, torch.inf)
    nearest = distances.topk(min(num_pos, len(points)), dim=0, largest=False).indices
    taken = torch.zeros_like(eligible).scatter_(0, nearest, True)
    distance, objects = distances.masked_fill(~taken, torch.inf).min(dim=1)
    return objects.masked_fill(distance.isinf(), NONE)


@torch.no_grad()
def assign_boxes(
    boxes: Tensor,
    gt_boxes: Tensor,
    positive: float = 0.5,
    negative: float = 0.4,
    valid: Tensor | None = None,
) -> Tensor:
    """Give each box the object that it overlaps most, by intersection over union.

    Every object also gets the boxes that overlap it most of all, however little; a later object
    takes them from an earlier one. One that no box overlaps, as one without area, gets none. A box
    that is no number overlaps nothing.

    Args:
        boxes: (A,4) XYXY.
        gt_boxes: (M,4) XYXY.
        positive: from this IoU on a box has an object.
        negative: below this one it is background; between them it is neither.
        valid: (A,) bool, the boxes that count; the others are neither. None: all.

    Returns:
        (A,) int64: index of the object, -1 for background, -2 for neither.

    Raises:
        UserError: ``negative`` is below 0 or above ``positive``.
    """
    check_overlaps(positive, negative)
    if not len(gt_boxes) or not len(boxes):
        assigned = boxes.new_full((len(boxes),), BACKGROUND, dtype=torch.int64)
        return assigned if valid is None else assigned.masked_fill(~valid, IGNORED)
    boxes = at_least_float32(boxes)
    overlaps = box_iou(gt_boxes.to(boxes.dtype), boxes).nan_to_num(nan=0.0)  # (M,A)
    if valid is not None:
        overlaps = overlaps.masked_fill(~valid, -1)
    best, objects = overlaps.max(dim=0)
    assigned = torch.full_like(objects, IGNORED)
    assigned = torch.where((best >= 0) & (best < negative), BACKGROUND, assigned)
    assigned = torch.where(best >= positive, objects, assigned)
    best_of_object = overlaps.amax(dim=1, keepdim=True)
    tied = (overlaps == best_of_object) & (best_of_object > 0)
    numbers = torch.arange(len(gt_boxes), device=boxes.device)[:, None]
    last = numbers.masked_fill(~tied, NONE).amax(dim=0)
    return torch.where(last >= 0, last, assigned)

"""SimOTA: which cells of an image answer for which of its objects.

Shape shorthand: A cells, K candidates among them, M objects, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...ranges import check_choice


class Form(NamedTuple):
    """What differs between the two versions of the authors' rule."""

    radius: float  # in strides
    inside_boxes: bool  # whether a cell within an object's box counts, too
    penalty: float  # added to the cost of a cell that an object should not have


FORMS = {"main": Form(1.5, False, 1e6), "v030": Form(2.5, True, 1e5)}
# An object gets as many cells as the sum of so many of its best IoUs says.
_BEST_IOUS = 10
_IOU_WEIGHT = 3.0
# Where the authors' binary cross entropy, of probabilities, ends.
_MAX_CROSS_ENTROPY = 100.0


class Matches(NamedTuple):
    """What ``simota`` gives, for every cell."""

    matched_gt: Tensor  # (A,) int64: the object's index, -1 for none
    matched_iou: Tensor  # (A,) float32: the IoU of the cell's box with it, 0 for none


@torch.no_grad()
def simota(
    class_logits: Tensor,
    objectness_logits: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_classes: Tensor,
    centres: Tensor,
    strides: Tensor,
    form: str = "main",
) -> Matches:
    """Match the predictions of one image with its objects.

    Every object takes the k candidates that cost it least, with k from the IoUs of its best
    candidates, 1 at least. The cost is the cross entropy of the class plus three times -log IoU,
    plus a penalty where the cell is not near the object. A cell that several objects take goes to
    the object of the image for which its cost is lowest.

    ``form`` chooses the candidates and the penalty. "main" is the authors' code since January
    2023: cells whose centre is less than 1.5 strides from an object's centre, in x and in y. "v030"
    is that of their releases 0.1 to 0.3 and of the paper, with which all published checkpoints were
    trained: cells within an object's box or less than 2.5 strides from its centre, where those
    that are not both pay.

    Unlike in the authors' code, an image all of whose objects are without a candidate has no
    match (theirs fails), and objects of negative or not finite width or height are left out
    (theirs makes the loss NaN); a predicted box that is no number is the last choice. Computed in
    float32 whatever the precision of the arguments.

    Args:
        class_logits: (A,C).
        objectness_logits: (A,).
        boxes: (A,4) predicted, centre x, y, width, height, pixels.
        gt_boxes: (M,4) likewise.
        gt_classes: (M,) integers.
        centres: (A,2) of the cells, x and y, pixels.
        strides: (A,) of the cells, pixels.
        form: "main" or "v030".

    Returns:
        ``matched_gt`` (A,), int64, -1 for none; ``matched_iou`` (A,), float32, 0 for none.

    Raises:
        UserError: the form is neither.
    """
    check_choice("YOLOX: form", form, FORMS)
    with torch.autocast(class_logits.device.type, enabled=False):
        boxes, gt_boxes, gt_classes = boxes.float(), gt_boxes.float(), gt_classes.long()
        matched_gt = torch.full((len(boxes),), -1, dtype=torch.int64, device=boxes.device)
        matched_iou = torch.zeros(len(boxes), device=boxes.device)
        if not len(gt_boxes):
            return Matches(matched_gt, matched_iou)
        valid = gt_boxes.isfinite().all(1) & (gt_boxes[:, 2:] >= 0).all(1)
        candidate, near = neighbourhood(gt_boxes, valid, centres.float(), strides.float(), form)
        index = candidate.nonzero().squeeze(1)
        iou = pairwise_iou(gt_boxes, boxes[index])
        cost = matching_cost(
            class_cost(class_logits[index].float(), objectness_logits[index].float(), gt_classes),
            iou,
            near[:, index],
            form,
        )
        # Not 0 for what is no number at all: those must not take part.
        usable = valid[:, None] & ~cost.isnan()
        cost = torch.where(usable, cost, torch.inf)
        iou = torch.where(usable, iou, 0.0)
        gt = _assign(cost, iou, valid)
        matched_gt[index] = gt
        matched_iou[index] = iou.gather(0, gt.clamp(min=0)[None])[0] * (gt >= 0)
    return Matches(matched_gt, matched_iou)


def neighbourhood(
    gt_boxes: Tensor, valid: Tensor, centres: Tensor, strides: Tensor, form: str
) -> tuple[Tensor, Tensor]:
    """
    Args:
        valid: (M,), which objects count.

    Returns:
        (A,) whether a cell is a candidate at all, and (M,A) whether it is near the object, where
        it costs no penalty.
    """
    radius, inside_boxes, _ = FORMS[form]
    x, y, width, height = gt_boxes[:, :, None].unbind(1)

    def within(reach_x: Tensor, reach_y: Tensor) -> Tensor:
        across = (centres[:, 0] > x - reach_x) & (centres[:, 0] < x + reach_x)
        along = (centres[:, 1] > y - reach_y) & (centres[:, 1] < y + reach_y)
        return across & along & valid[:, None]

    near = within(radius * strides, radius * strides)
    if not inside_boxes:
        return near.any(0), near
    inside = within(width / 2, height / 2)
    return (near | inside).any(0), near & inside


def pairwise_iou(gt_boxes: Tensor, boxes: Tensor) -> Tensor:
    """(M,K) of boxes as centre x, y, width, height."""
    gt_boxes, boxes = gt_boxes[:, None], boxes[None]
    low = torch.maximum(
        gt_boxes[..., :2] - gt_boxes[..., 2:] / 2, boxes[..., :2] - boxes[..., 2:] / 2
    )
    high = torch.minimum(
        gt_boxes[..., :2] + gt_boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2
    )
    common = (high - low).clamp(min=0).prod(2)
    union = gt_boxes[..., 2:].prod(2) + boxes[..., 2:].prod(2) - common
    # Two boxes without area have none in common.
    return common / union.clamp(min=torch.finfo(union.dtype).tiny)


def class_cost(class_logits: Tensor, objectness_logits: Tensor, gt_classes: Tensor) -> Tensor:
    """(M,K): cross entropy of a cell's probabilities with an object's class, summed over classes.

    A probability is the geometric mean of the class's and the objectness's. The logarithms are
    those of probabilities in float32, and end at -100, as the authors' do: where they are
    saturated, the cross entropy of logits would differ.
    """
    probability = (class_logits.sigmoid() * objectness_logits.sigmoid()[:, None]).sqrt()
    absent = -torch.log1p(-probability).clamp(min=-_MAX_CROSS_ENTROPY)
    present = -probability.log().clamp(min=-_MAX_CROSS_ENTROPY)
    # All classes once per cell rather than per pair; float64 for the difference of large sums.
    total = absent.sum(1, dtype=torch.float64)[:, None]
    one = total + (present[:, gt_classes].double() - absent[:, gt_classes].double())
    return one.T.float()


def matching_cost(class_cost: Tensor, iou: Tensor, near: Tensor, form: str) -> Tensor:
    """(M,K), added in the authors' order: beside the penalty, float32 has few digits left."""
    return class_cost + _IOU_WEIGHT * -torch.log(iou + 1e-8) + FORMS[form].penalty * (~near).float()


def _assign(cost: Tensor, iou: Tensor, valid: Tensor) -> Tensor:
    """(K,): the object of every candidate, -1 for none."""
    best = min(_BEST_IOUS, cost.shape[1])
    # Truncated, as the authors do.
    number = iou.topk(best, dim=1).values.sum(1).int().clamp(min=1) * valid
    cheapest = cost.topk(best, dim=1, largest=False).indices
    taken = torch.arange(best, device=cost.device) < number[:, None]
    picks = torch.zeros_like(cost).scatter_(1, cheapest, taken.to(cost.dtype))
    takers = picks.sum(0)
    gt = torch.where(takers > 1, cost.argmin(0), picks.argmax(0))
    return torch.where(takers > 0, gt, -1)

"""Losses between what the heads of student and teacher predict at each cell.

Shape shorthand: N images, A anchors a cell, L logits a cell (A times the classes, or A), H x W
cells of one level. ``valid`` is (N,H,W) bool. All is computed in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from ..ranges import check_number


class Predictions(NamedTuple):
    """Of one level."""

    logits: Tensor  # (N,L,H,W), the classes of an anchor side by side
    boxes: Tensor | None = None  # (N,4A,H,W): XYXY in pixels of each anchor


Levels = Sequence[Predictions]


class PredictionLoss(nn.Module):
    """A loss between the predictions of all levels of two heads, off unless a config names one.

    A subclass implements ``forward(student, teacher, valid)``, of each level the predictions of
    either side, which are the same anchors' and classes', and (N,H,W) bool. It returns a scalar for
    each level, and no gradient reaches a cell that is not valid.
    """

    # Whether ``Predictions.boxes`` are to be there: a subclass that uses them sets it.
    needs_boxes = False

    def forward(self, student: Levels, teacher: Levels, valid: Sequence[Tensor]) -> list[Tensor]:
        raise NotImplementedError


def _bce(student: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(student, target, reduction="none")


class PredictionMimicLoss(PredictionLoss):
    """The quality focal loss to the teacher's scores: prediction mimicking, as CrossKD has it.

    With q = sigmoid of the teacher's logits, the sum over valid cells and logits of

        |sigmoid(s) - q|^beta * BCE(s, q),

    as CrossKD's ``KDQualityFocalLoss`` (Wang et al., CVPR 2024, github.com/jbwang1997/CrossKD),
    divided by the teacher's own number of positives, the sum over all levels' valid cells of its
    largest score there, at least 1. Theirs divides by the positives of the student's assignment,
    and takes the student's features through the teacher's head, which needs heads of one shape.
    """

    def __init__(self, *, weight: float = 1.0, beta: float = 1.0) -> None:
        """
        Args:
            weight: multiplies the loss; >= 0.
            beta: how much less an already equal score counts; >= 0.
        """
        super().__init__()
        self.weight = check_number("PredictionMimicLoss: weight", weight)
        self.beta = check_number("PredictionMimicLoss: beta", beta)

    def forward(self, student: Levels, teacher: Levels, valid: Sequence[Tensor]) -> list[Tensor]:
        targets = [t.logits.sigmoid() for t in teacher]
        pairs = zip(targets, valid, strict=True)
        largest = [q.amax(dim=1).masked_fill(~mask, 0).sum() for q, mask in pairs]
        positives = sum(largest).clamp(min=1)
        losses = []
        for level, q, mask in zip(student, targets, valid, strict=True):
            # Where nothing is real there may be anything.
            s, q = (x.masked_fill(~mask[:, None], 0) for x in (level.logits, q))
            cost = (s.sigmoid() - q).abs().pow(self.beta) * _bce(s, q)
            losses.append(self.weight * cost.masked_fill(~mask[:, None], 0).sum() / positives)
        return losses


class ObjectnessLoss(PredictionLoss):
    """G2SD's second term (Huang et al., CVPR 2023): the proposals' objectness to the teacher's.

    With q = sigmoid of the teacher's logits and m its largest at a cell, for each level

        sum m BCE(s, q) / sum m

    over valid cells and logits, which G2SD adds to its feature term (``G2SDLoss``).
    """

    def __init__(self, *, weight: float = 0.1) -> None:
        """
        Args:
            weight: multiplies the loss; >= 0. The default is theirs.
        """
        super().__init__()
        self.weight = check_number("ObjectnessLoss: weight", weight)

    def forward(self, student: Levels, teacher: Levels, valid: Sequence[Tensor]) -> list[Tensor]:
        losses = []
        for ours, theirs, mask in zip(student, teacher, valid, strict=True):
            s, t = (x.logits.masked_fill(~mask[:, None], 0) for x in (ours, theirs))
            q = t.sigmoid()
            m = q.amax(dim=1, keepdim=True).masked_fill(~mask[:, None], 0)
            total = m.expand_as(q).sum().clamp(min=torch.finfo(q.dtype).tiny)
            losses.append(self.weight * (m * _bce(s, q)).sum() / total)
        return losses


class BoxMimicLoss(PredictionLoss):
    """The teacher's boxes by generalised IoU, each as much as the teacher is sure of it.

    With q of an anchor the sigmoid of the teacher's largest logit there, over valid cells,

        sum q (1 - GIoU(student's box, teacher's box)),

    CrossKD's regression term for RetinaNet (see ``PredictionMimicLoss``), divided by the sum of q
    over all levels, at least 1. Theirs divides by the positives of the student's assignment, and
    for FCOS takes 1 - IoU.
    """

    needs_boxes = True

    def __init__(self, *, weight: float = 1.0) -> None:
        """
        Args:
            weight: multiplies the loss; >= 0.
        """
        super().__init__()
        self.weight = check_number("BoxMimicLoss: weight", weight)

    def forward(self, student: Levels, teacher: Levels, valid: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(teacher, valid, strict=True)
        sure = [_largest_of_anchors(t).masked_fill(~mask[:, None], 0) for t, mask in pairs]
        total = sum(q.sum() for q in sure).clamp(min=1)
        losses = []
        for s, t, q, mask in zip(student, teacher, sure, valid, strict=True):
            boxes = [_boxes_of_anchors(side, mask) for side in (s, t)]
            cost = generalized_box_iou_loss(*boxes)
            losses.append(self.weight * (q * cost).sum() / total)
        return losses


def _largest_of_anchors(level: Predictions) -> Tensor:
    """(N,A,H,W): the largest score over an anchor's classes."""
    anchors = level.boxes.shape[1] // 4
    return level.logits.unflatten(1, (anchors, -1)).amax(dim=2).sigmoid()


def _boxes_of_anchors(level: Predictions, valid: Tensor) -> Tensor:
    """(N,A,H,W,4), one box for all cells that are not valid, where there may be anything."""
    boxes = level.boxes.unflatten(1, (-1, 4)).movedim(2, -1)
    return torch.where(valid[:, None, ..., None], boxes, boxes.new_tensor([0.0, 0.0, 1.0, 1.0]))

"""Losses between what the heads of student and teacher predict at each cell.

Shape shorthand: N images, L logits a cell (anchors times classes), H x W cells of one level.
``valid`` is (N,H,W) bool. All is computed in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import non_negative


class PredictionLoss(nn.Module):
    """A loss between the logits of all levels of a head, off unless a config names one.

    A subclass implements ``forward(student, teacher, valid)``, of each level (N,L,H,W) logits of
    either side, which are the same anchors' and classes', and (N,H,W) bool. It returns a scalar for
    each level, and no gradient reaches a cell that is not valid.
    """

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], valid: Sequence[Tensor]
    ) -> list[Tensor]:
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
        self.weight = non_negative("PredictionMimicLoss", weight=weight)
        self.beta = non_negative("PredictionMimicLoss", beta=beta)

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], valid: Sequence[Tensor]
    ) -> list[Tensor]:
        targets = [t.sigmoid() for t in teacher]
        pairs = zip(targets, valid, strict=True)
        largest = [q.amax(dim=1).masked_fill(~mask, 0).sum() for q, mask in pairs]
        positives = sum(largest).clamp(min=1)
        losses = []
        for s, q, mask in zip(student, targets, valid, strict=True):
            # Where nothing is real there may be anything.
            s, q = (x.masked_fill(~mask[:, None], 0) for x in (s, q))
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
        self.weight = non_negative("ObjectnessLoss", weight=weight)

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], valid: Sequence[Tensor]
    ) -> list[Tensor]:
        losses = []
        for s, t, mask in zip(student, teacher, valid, strict=True):
            s, t = (x.masked_fill(~mask[:, None], 0) for x in (s, t))
            q = t.sigmoid()
            m = q.amax(dim=1, keepdim=True).masked_fill(~mask[:, None], 0)
            total = m.expand_as(q).sum().clamp(min=torch.finfo(q.dtype).tiny)
            losses.append(self.weight * (m * _bce(s, q)).sum() / total)
        return losses

"""G2SD's fine-grained loss: imitation where the teacher sees objects."""

from __future__ import annotations

from torch import Tensor

from ..distill.disparity import zero_outside
from ..ranges import check_number
from .base import FeatureCriterion, LevelFeatures, objectness_of, sum_over_cells


class G2SDLoss(FeatureCriterion):
    """L = weight * sum over valid cells of m |S - T|^2 / sum of m,

    m the teacher's objectness of a cell: the largest sigmoid over the anchors of its proposal
    generator, or a dense detector's score, which is not in the paper (``distill.objectness``).
    |.|^2 sums over channels. The authors' adapter is a 3x3 convolution:
    ``model.head.adapter="conv3x3"``.

    Huang et al., "Generic-to-Specific Distillation of Masked Autoencoders", CVPR 2023, in the form
    of the authors' code for ViTDet. Deviation: padding is left out. Their second term, the
    cross-entropy between the proposal generators' outputs, is no feature loss: it is
    ``predictions.ObjectnessLoss``.
    """

    needs_objectness = True
    needs_boxes = False

    def __init__(self, *, weight: float = 1e-3) -> None:
        """
        Args:
            weight: multiplies the loss; >= 0. Published: 1e-3, rising over 500 iterations
                (``model.head.warmup_iters``).
        """
        super().__init__()
        self.weight = check_number("G2SDLoss: weight", weight)

    def forward(self, level: LevelFeatures) -> Tensor:
        valid, objectness = level.valid, objectness_of(level, "G2SDLoss")
        gap = zero_outside(level.student - level.teacher, valid)
        cost = gap.square().sum(dim=1)
        total = sum_over_cells(cost * (self.weight * objectness), valid)
        return total / sum_over_cells(objectness, valid).clamp(min=1e-6)

"""Plain imitation of the features (FitNets; the baseline of most later methods)."""

from __future__ import annotations

from torch import Tensor

from ..distill.disparity import zero_outside
from ..ranges import check_number
from .base import FeatureCriterion, LevelFeatures, mean_over_cells


class MimicLoss(FeatureCriterion):
    """L = weight * mean over valid cells and channels of (S - T)^2.

    Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015; a mean as detectors use it, where
    the paper sums. Its regressor is the head's adapter.
    """

    needs_boxes = False

    def __init__(self, *, weight: float = 1.0) -> None:
        """
        Args:
            weight: multiplies the loss; >= 0.
        """
        super().__init__()
        self.weight = check_number("MimicLoss: weight", weight)

    def forward(self, level: LevelFeatures) -> Tensor:
        gap = zero_outside(level.student - level.teacher, level.valid)
        cost = gap.square().mean(dim=1)
        return self.weight * mean_over_cells(cost, level.valid)

"""PKD: imitation up to scale and offset of each channel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distill.disparity import scale_features
from ..distill.processes import sum_over_processes
from ..ranges import check_number
from .base import FeatureCriterion, LevelFeatures, mean_over_cells


class PKDLoss(FeatureCriterion):
    """L = weight / 2 * mean of (s - t)^2; s, t: each channel standardised over the valid cells.

    Up to (n - 1) / n for n cells, weight * (1 - r), r the mean Pearson correlation of the channels.

    Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
    Coefficient", NeurIPS 2022, in the form of the authors' code (mmrazor): the variance is the
    unbiased one. Deviations: cells of padding are left out, where the original is silent about
    them; nothing is resized, since the levels are paired by stride.
    """

    needs_boxes = False

    def __init__(self, *, weight: float = 1.0, sync_statistics: bool = False) -> None:
        """
        Args:
            weight: multiplies the loss; >= 0. Published: 6 (two-stage), 10 (one-stage).
            sync_statistics: standardise over the batches of all processes; see ``DFDLoss``.
        """
        super().__init__()
        self.weight = check_number("PKDLoss: weight", weight)
        self.sync_statistics = sync_statistics

    def forward(self, level: LevelFeatures) -> Tensor:
        student, valid = level.student, level.valid
        s, t = scale_features(
            student, level.teacher, valid, "channel", sync=self.sync_statistics
        )
        cells = torch.ones_like(student[:, 0]) if valid is None else valid.to(student)
        cells = cells.sum()
        if self.sync_statistics:
            cells = sum_over_processes(cells)
        cells = cells.clamp(min=1)
        # scale_features divides by the biased deviation.
        unbiased = (cells - 1) / cells
        cost = (s - t).square().mean(dim=1)
        return self.weight / 2 * unbiased * mean_over_cells(cost, valid)

"""CWD: each channel as a distribution over the cells of an image."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..ranges import check_number, check_positive
from .base import FeatureCriterion, LevelFeatures, hide_invalid


class CWDLoss(FeatureCriterion):
    """L = weight * tau^2 / (N C) * sum over images and channels of KL(p_T || p_S),

    p the softmax of a channel's features / tau over the valid cells of the image.

    Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, in the form
    of the authors' code (mmrazor). Deviation: cells of padding are outside the distribution, where
    the original is silent about them.
    """

    needs_boxes = False

    def __init__(self, *, tau: float = 1.0, weight: float = 1.0) -> None:
        """
        Args:
            tau: temperature, > 0.
            weight: multiplies the loss; >= 0. Published: 10 at tau 1 (mmrazor's detectors).
        """
        super().__init__()
        self.weight = check_number("CWDLoss: weight", weight)
        self.tau = check_positive("CWDLoss: tau", tau)

    def forward(self, level: LevelFeatures) -> Tensor:
        student, teacher, valid = level.student, level.teacher, level.valid
        log_s, log_t = (self._log_softmax(x, valid) for x in (student, teacher))
        divergence = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
        images, channels = student.shape[:2]
        return self.weight * self.tau**2 / (images * channels) * divergence

    def _log_softmax(self, features: Tensor, valid: Tensor | None) -> Tensor:
        """(N,C,H,W) to (N,C,HW)."""
        cells = None if valid is None else valid.flatten(1).unsqueeze(1)
        return F.log_softmax(hide_invalid(features.flatten(2) / self.tau, cells), dim=2)

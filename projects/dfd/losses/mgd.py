"""MGD: the teacher's features told from a part of the student's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distill.disparity import zero_outside
from ..errors import UserError
from ..ranges import check_number, is_number
from .base import FeatureCriterion, LevelFeatures, sum_over_cells
from .generator import FeatureGenerator


class MGDLoss(FeatureCriterion):
    """L = alpha_mgd / N * sum over valid cells and channels of (G(M S) - T)^2,

    M zero in a random share lambda_mgd of the cells, drawn anew at every call, one else;
    G = conv3x3, ReLU, conv3x3, learnt.

    Yang et al., "Masked Generative Distillation", ECCV 2022, in the form of the authors' code. As
    there it is a sum: the weight means something else at another resolution or number of channels.
    Deviation: padding costs nothing and G does not see it, where the original is silent about it.
    """

    needs_boxes = False

    def __init__(
        self, *, channels: int | None = None, alpha_mgd: float = 2e-5, lambda_mgd: float = 0.65
    ) -> None:
        """
        Args:
            channels: C; the head fills it in.
            alpha_mgd: the weight, >= 0. Published: 2e-5 (one-stage), 5e-7 (two-stage).
            lambda_mgd: share of cells hidden, in [0, 1). Published: 0.65, and 0.45.
        """
        super().__init__()
        self.alpha_mgd = check_number("MGDLoss: alpha_mgd", alpha_mgd)
        if not is_number(lambda_mgd) or not 0 <= lambda_mgd < 1:
            raise UserError(f"MGDLoss: lambda_mgd is {lambda_mgd!r}; it must be from 0 to below 1")
        self.lambda_mgd = lambda_mgd
        self.generator: FeatureGenerator | None = None
        if channels is not None:
            self.set_channels(channels)

    def set_channels(self, channels: int) -> None:
        if self.generator is None:
            self.generator = FeatureGenerator(channels)

    def forward(self, level: LevelFeatures) -> Tensor:
        student, valid = level.student, level.valid
        if self.generator is None:
            raise UserError("MGDLoss needs channels=C when used without a head")
        images, _, height, width = student.shape
        draw = torch.rand(images, 1, height, width, device=student.device)
        generated = self.generator(student, draw > 1 - self.lambda_mgd, valid)
        gap = zero_outside(generated - level.teacher, valid)
        cost = gap.square().sum(dim=1)
        return sum_over_cells(self.alpha_mgd / images * cost, valid)

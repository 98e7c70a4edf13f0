"""A small network that tells the teacher's features from part of the student's."""

from __future__ import annotations

from torch import Tensor, nn

from ..distill.disparity import zero_outside


class FeatureGenerator(nn.Module):
    """conv3x3, ReLU, conv3x3, blind to padding.

    The form of MGD's generation block (Yang et al., "Masked Generative Distillation", ECCV 2022).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """
        Args:
            x: (N,C,H,W).
            hidden: (N,1,H,W) bool, the cells whose content is kept from the network.
            valid: (N,H,W) bool or None. Cells outside are treated as the convolution's own zero
                padding, before both layers, so that a batch padded further gives the same output.
        """
        x = zero_outside(x.masked_fill(hidden, 0), valid)
        return self.conv2(zero_outside(self.relu(self.conv1(x)), valid))

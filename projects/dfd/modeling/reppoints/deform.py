"""Deformable convolutions (Dai et al., ICCV 2017) that need no compiled part of Detectron2.

They are torchvision's, computed in float32 under autocast too: in half precision samples would be
off their places, by the more the further these are.
"""

from __future__ import annotations

from typing import Any

import fvcore.nn.weight_init as weight_init
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from .points import at_least_float32


class DeformConv(DeformConv2d):
    """A deformable convolution without bias, whose offsets are given."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, **kwargs: Any
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias=False, **kwargs)

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """
        Args:
            x: (N,C,H,W).
            offset: (N,2K,H',W') in cells of x, of each of the K places of the kernel y, then x.

        Returns:
            (N,C',H',W'), at least in float32.
        """
        return super().forward(at_least_float32(x), at_least_float32(offset))


class _ConvOfOwnOffsets(DeformConv):
    """A 3x3 deformable convolution whose offsets are convolved from its input; a norm follows."""

    def __init__(self, channels: int, norm: nn.Module | None, groups: int, **kwargs: int) -> None:
        super().__init__(channels, channels, 3, groups=groups, **kwargs)
        self.conv_offset = Conv2d(channels, 2 * 3 * 3, 3, **kwargs)
        self.norm = norm
        weight_init.c2_msra_fill(self)
        # So that it begins as a plain convolution.
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x, self.conv_offset(x))
        return out if self.norm is None else self.norm(out)


class DeformConvBlock(BottleneckBlock):
    """Detectron2's bottleneck with a deformable 3x3 convolution, for ``ResNet.make_stage``.

    The keys are the plain block's and ``conv2.conv_offset``'s.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        norm: str = "BN",
        stride_in_1x1: bool = False,
        dilation: int = 1,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            bottleneck_channels=bottleneck_channels,
            stride=stride,
            num_groups=num_groups,
            norm=norm,
            stride_in_1x1=stride_in_1x1,
            dilation=dilation,
        )
        self.conv2 = _ConvOfOwnOffsets(
            bottleneck_channels,
            get_norm(norm, bottleneck_channels),
            groups=num_groups,
            stride=1 if stride_in_1x1 else stride,
            padding=dilation,
            dilation=dilation,
        )

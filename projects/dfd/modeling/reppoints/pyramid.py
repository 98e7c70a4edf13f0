"""The coarse levels of RepPoints' feature pyramid."""

from __future__ import annotations

import fvcore.nn.weight_init as weight_init
from detectron2.layers import Conv2d, get_norm
from torch import Tensor, nn

from ...errors import UserError


class P6P7(nn.Module):
    """P6 and P7 from C5, each by one convolution of stride 2: the ``top_block`` of an FPN.

    Unlike Detectron2's ``LastLevelP6P7`` it may have norms, and there is no ReLU before P7.
    """

    def __init__(
        self, in_channels: int, out_channels: int, norm: str = "GN", in_feature: str = "res5"
    ) -> None:
        """
        Args:
            in_channels: of ``in_feature``.
            norm: as the FPN's; "": none, and biases instead.

        Raises:
            UserError: groups of a GN would be single channels. Of a level of one cell, as P7 of a
                small image is, it would leave nothing.
        """
        super().__init__()
        if norm == "GN" and out_channels < 64:
            raise UserError(
                f'P6P7: under norm="GN", 32 groups, out_channels is {out_channels}; it must be a '
                "multiple of 32 from 64 on, or the norm another"
            )
        self.num_levels = 2
        self.in_feature = in_feature
        for name, channels in (("p6", in_channels), ("p7", out_channels)):
            conv = Conv2d(
                channels,
                out_channels,
                kernel_size=3,
                stride=2,
                padding=1,
                bias=norm == "",
                norm=get_norm(norm, out_channels),
            )
            weight_init.c2_xavier_fill(conv)
            self.add_module(name, conv)

    def forward(self, c5: Tensor) -> list[Tensor]:
        p6 = self.p6(c5)
        return [p6, self.p7(p6)]

"""YOLOX's backbone: a CSPDarknet, or another trunk, and the path aggregation over three levels.

Shape shorthand: N images, C channels, H x W cells of one level.
"""

from __future__ import annotations

import torch
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UserError
from .blocks import BaseConv, CSPLayer, Focus, SPPBottleneck, conv3x3

LEVELS = {"p3": 8, "p4": 16, "p5": 32}
# Channels of the levels at width 1.
_CHANNELS = (256, 512, 1024)


def level_channels(width: float) -> list[int]:
    """Channels of p3, p4 and p5."""
    return [int(channels * width) for channels in _CHANNELS]


class CSPDarknet(nn.Module):
    """The trunk; gives its features at strides 8, 16 and 32."""

    def __init__(self, *, depth: float, width: float, depthwise: bool, activation: str) -> None:
        super().__init__()
        base = int(64 * width)
        count = max(round(3 * depth), 1)
        self.stem = Focus(3, base, activation=activation)

        def stage(c_in: int, blocks: int, last: bool = False) -> nn.Sequential:
            kind = {"depthwise": depthwise, "activation": activation}
            c_out = 2 * c_in
            down = conv3x3(c_in, c_out, stride=2, **kind)
            spp = [SPPBottleneck(c_out, c_out, activation=activation)] if last else []
            layer = CSPLayer(c_out, c_out, blocks, shortcut=not last, **kind)
            return nn.Sequential(down, *spp, layer)

        self.dark2 = stage(base, count)
        self.dark3 = stage(2 * base, 3 * count)
        self.dark4 = stage(4 * base, 3 * count)
        self.dark5 = stage(8 * base, count, last=True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stride8 = self.dark3(self.dark2(self.stem(images)))
        stride16 = self.dark4(stride8)
        return stride8, stride16, self.dark5(stride16)


class PAFPN(Backbone):
    """Path aggregation over a trunk: levels p3, p4, p5 at strides 8, 16, 32.

    Over CSPDarknet the keys are those of the authors' ``YOLOPAFPN``. Over another trunk only the
    convolutions that take its features differ.
    """

    def __init__(
        self,
        *,
        depth: float,
        width: float,
        depthwise: bool,
        activation: str,
        trunk: Backbone | None = None,
    ) -> None:
        """
        Args:
            depth: times the number of bottlenecks of each stage, 3 (9 in two of them).
            width: times the channels, 256 to 1024 on the levels.
            depthwise: 3x3 convolutions are a depthwise and a pointwise one (nano).
            activation: "silu", "relu" or "lrelu".
            trunk: with one level at each of strides 8, 16 and 32; None: a CSPDarknet.

        Raises:
            UserError: the trunk has other strides.
        """
        super().__init__()
        kind = {"depthwise": depthwise, "activation": activation}
        c3, c4, c5 = level_channels(width)
        count = round(3 * depth)
        # The trunk's levels by name, and its channels on them.
        self._inputs = None if trunk is None else _trunk_levels(trunk)
        t3, t4, t5 = (
            (c3, c4, c5)
            if self._inputs is None
            else (trunk.output_shape()[name].channels for name in self._inputs)
        )

        def layer(c_in: int, c_out: int) -> CSPLayer:
            return CSPLayer(c_in, c_out, count, shortcut=False, **kind)

        self.backbone = CSPDarknet(depth=depth, width=width, **kind) if trunk is None else trunk
        self.lateral_conv0 = BaseConv(t5, c4, 1, activation=activation)
        self.C3_p4 = layer(c4 + t4, c4)
        self.reduce_conv1 = BaseConv(c4, c3, 1, activation=activation)
        self.C3_p3 = layer(c3 + t3, c3)
        self.bu_conv2 = conv3x3(c3, c3, stride=2, **kind)
        self.C3_n3 = layer(2 * c3, c4)
        self.bu_conv1 = conv3x3(c4, c4, stride=2, **kind)
        self.C3_n4 = layer(2 * c4, c5)
        self._out_features = list(LEVELS)
        self._out_feature_strides = dict(LEVELS)
        self._out_feature_channels = dict(zip(LEVELS, (c3, c4, c5), strict=True))

    @property
    def size_divisibility(self) -> int:
        own = 1 if self._inputs is None else self.backbone.size_divisibility
        return max(*LEVELS.values(), own)

    @property
    def padding_constraints(self) -> dict[str, int]:
        # A trunk may be made for square images of one size.
        trunk = {} if self._inputs is None else self.backbone.padding_constraints
        return {**trunk, "size_divisibility": self.size_divisibility}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """
        Args:
            images: (N,3,height,width), sides multiples of 32.

        Returns:
            Level name to (N,C,H,W).
        """
        features = self.backbone(images)
        if self._inputs is not None:
            features = [features[name] for name in self._inputs]
        dark3, dark4, dark5 = features
        lateral = self.lateral_conv0(dark5)
        reduced = self.reduce_conv1(self.C3_p4(torch.cat([_twice(lateral), dark4], dim=1)))
        p3 = self.C3_p3(torch.cat([_twice(reduced), dark3], dim=1))
        p4 = self.C3_n3(torch.cat([self.bu_conv2(p3), reduced], dim=1))
        p5 = self.C3_n4(torch.cat([self.bu_conv1(p4), lateral], dim=1))
        return {"p3": p3, "p4": p4, "p5": p5}


def _trunk_levels(trunk: Backbone) -> list[str]:
    """A trunk's levels, finest first."""
    strides = {name: shape.stride for name, shape in trunk.output_shape().items()}
    names = sorted(strides, key=strides.__getitem__)
    if [strides[name] for name in names] != list(LEVELS.values()):
        raise UserError(
            f"YOLOX: the trunk's levels have the strides {strides}; it must have one each of 8, 16 "
            "and 32: set its out_features, as [c3,c4,c5]"
        )
    return names


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")

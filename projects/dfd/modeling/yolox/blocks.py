"""The parts that YOLOX's networks are made of.

Shape shorthand: N images, C channels, H x W cells. The names of the parts are those of the authors'
code, so that their checkpoints load as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# torch's own defaults, 1e-5 and 0.1, give other outputs with the authors' weights.
BN_EPS = 1e-3
BN_MOMENTUM = 0.03
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": lambda: nn.SiLU(inplace=True),
    "relu": lambda: nn.ReLU(inplace=True),
    "lrelu": lambda: nn.LeakyReLU(0.1, inplace=True),
}


class BaseConv(nn.Module):
    """Convolution without bias, batch norm, activation."""

    # For the teacher's pass, which folds the one into the other.
    norm_follows_conv = True

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        *,
        activation: str,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            c_in, c_out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(c_out, eps=BN_EPS, momentum=BN_MOMENTUM)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class DWConv(nn.Module):
    """A depthwise and a pointwise BaseConv."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int, *, activation: str, stride: int = 1
    ) -> None:
        super().__init__()
        self.dconv = BaseConv(c_in, c_in, kernel, stride=stride, groups=c_in, activation=activation)
        self.pconv = BaseConv(c_in, c_out, 1, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.pconv(self.dconv(x))


def conv3x3(
    c_in: int, c_out: int, *, depthwise: bool, activation: str, stride: int = 1
) -> BaseConv | DWConv:
    kind = DWConv if depthwise else BaseConv
    return kind(c_in, c_out, 3, stride=stride, activation=activation)


class Focus(nn.Module):
    """The four pixels of every 2 x 2 block as channels, column by column, then a BaseConv."""

    def __init__(self, c_in: int, c_out: int, *, activation: str) -> None:
        super().__init__()
        self.conv = BaseConv(4 * c_in, c_out, 3, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        rows = x[..., ::2, :], x[..., 1::2, :]
        return self.conv(torch.cat([row[..., i::2] for i in (0, 1) for row in rows], dim=1))


class Bottleneck(nn.Module):
    def __init__(self, channels: int, *, shortcut: bool, depthwise: bool, activation: str) -> None:
        super().__init__()
        self.conv1 = BaseConv(channels, channels, 1, activation=activation)
        self.conv2 = conv3x3(channels, channels, depthwise=depthwise, activation=activation)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        return y + x if self.shortcut else y


class CSPLayer(nn.Module):
    """Bottlenecks over one half of the channels, the other half past them, joined by ``conv3``."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        count: int,
        *,
        shortcut: bool = True,
        depthwise: bool,
        activation: str,
    ) -> None:
        super().__init__()
        hidden = c_out // 2
        self.conv1 = BaseConv(c_in, hidden, 1, activation=activation)
        self.conv2 = BaseConv(c_in, hidden, 1, activation=activation)
        self.conv3 = BaseConv(2 * hidden, c_out, 1, activation=activation)
        self.m = nn.Sequential(
            *(
                Bottleneck(hidden, shortcut=shortcut, depthwise=depthwise, activation=activation)
                for _ in range(count)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        branch, bypass = self.conv1(x), self.conv2(x)
        return self.conv3(torch.cat([self.m(branch), bypass], dim=1))


class SPPBottleneck(nn.Module):
    """Maxima over windows of 5, 9 and 13 cells beside the cells themselves."""

    def __init__(self, c_in: int, c_out: int, *, activation: str) -> None:
        super().__init__()
        self.conv1 = BaseConv(c_in, c_in // 2, 1, activation=activation)
        self.conv2 = BaseConv(4 * (c_in // 2), c_out, 1, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [self.conv1(x)]
        for _ in range(3):
            # A window of 5 over one of 5 is one of 9, at a quarter of its price.
            pooled.append(F.max_pool2d(pooled[-1], 5, stride=1, padding=2))
        return self.conv2(torch.cat(pooled, dim=1))

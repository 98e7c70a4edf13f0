"""YOLOX's network written as plainly as the authors' code is, for yolox_cost.py to compare with.

The keys of its state dict are theirs, and so those of dfd.modeling.YOLOX. Nothing is taken from
there: what one of the two gets wrong shows as a difference between their outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BaseConv(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__()
        padding = (kernel - 1) // 2
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class DWConv(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1):
        super().__init__()
        self.dconv = BaseConv(c_in, c_in, kernel, stride, groups=c_in)
        self.pconv = BaseConv(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pconv(self.dconv(x))


class Focus(nn.Module):
    def __init__(self, c_out: int):
        super().__init__()
        self.conv = BaseConv(12, c_out, 3)

    def forward(self, x: Tensor) -> Tensor:
        top_left, top_right = x[..., ::2, ::2], x[..., ::2, 1::2]
        bottom_left, bottom_right = x[..., 1::2, ::2], x[..., 1::2, 1::2]
        return self.conv(torch.cat([top_left, bottom_left, top_right, bottom_right], 1))


class Bottleneck(nn.Module):
    def __init__(self, channels: int, shortcut: bool, conv: type[nn.Module]):
        super().__init__()
        self.conv1 = BaseConv(channels, channels, 1)
        self.conv2 = conv(channels, channels, 3)
        self.add = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        if self.add:
            y = y + x
        return y


class CSPLayer(nn.Module):
    def __init__(self, c_in: int, c_out: int, n: int, shortcut: bool, conv: type[nn.Module]):
        super().__init__()
        hidden = c_out // 2
        self.conv1 = BaseConv(c_in, hidden, 1)
        self.conv2 = BaseConv(c_in, hidden, 1)
        self.conv3 = BaseConv(2 * hidden, c_out, 1)
        self.m = nn.Sequential(*[Bottleneck(hidden, shortcut, conv) for _ in range(n)])

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(torch.cat((self.m(self.conv1(x)), self.conv2(x)), 1))


class SPPBottleneck(nn.Module):
    """Three max pools, each over the same input."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = channels // 2
        self.conv1 = BaseConv(channels, hidden, 1)
        self.pools = nn.ModuleList(nn.MaxPool2d(k, stride=1, padding=k // 2) for k in (5, 9, 13))
        self.conv2 = BaseConv(4 * hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.conv2(torch.cat([x] + [pool(x) for pool in self.pools], 1))


class CSPDarknet(nn.Module):
    def __init__(self, base: int, n: int, conv: type[nn.Module]):
        super().__init__()
        self.stem = Focus(base)
        c2, c3, c4, c5 = 2 * base, 4 * base, 8 * base, 16 * base
        self.dark2 = nn.Sequential(conv(base, c2, 3, 2), CSPLayer(c2, c2, n, True, conv))
        self.dark3 = nn.Sequential(conv(c2, c3, 3, 2), CSPLayer(c3, c3, 3 * n, True, conv))
        self.dark4 = nn.Sequential(conv(c3, c4, 3, 2), CSPLayer(c4, c4, 3 * n, True, conv))
        self.dark5 = nn.Sequential(
            conv(c4, c5, 3, 2), SPPBottleneck(c5), CSPLayer(c5, c5, n, False, conv)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dark3 = self.dark3(self.dark2(self.stem(x)))
        dark4 = self.dark4(dark3)
        return dark3, dark4, self.dark5(dark4)


class PAFPN(nn.Module):
    def __init__(self, depth: float, width: float, conv: type[nn.Module]):
        super().__init__()
        n = max(round(3 * depth), 1)
        c3, c4, c5 = int(256 * width), int(512 * width), int(1024 * width)
        self.backbone = CSPDarknet(int(64 * width), n, conv)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.lateral_conv0 = BaseConv(c5, c4, 1)
        self.C3_p4 = CSPLayer(2 * c4, c4, n, False, conv)
        self.reduce_conv1 = BaseConv(c4, c3, 1)
        self.C3_p3 = CSPLayer(2 * c3, c3, n, False, conv)
        self.bu_conv2 = conv(c3, c3, 3, 2)
        self.C3_n3 = CSPLayer(2 * c3, c4, n, False, conv)
        self.bu_conv1 = conv(c4, c4, 3, 2)
        self.C3_n4 = CSPLayer(2 * c4, c5, n, False, conv)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dark3, dark4, dark5 = self.backbone(x)
        lateral = self.lateral_conv0(dark5)
        x = self.C3_p4(torch.cat([self.upsample(lateral), dark4], 1))
        reduced = self.reduce_conv1(x)
        p3 = self.C3_p3(torch.cat([self.upsample(reduced), dark3], 1))
        p4 = self.C3_n3(torch.cat([self.bu_conv2(p3), reduced], 1))
        return p3, p4, self.C3_n4(torch.cat([self.bu_conv1(p4), lateral], 1))


class Head(nn.Module):
    def __init__(self, num_classes: int, width: float, conv: type[nn.Module]):
        super().__init__()
        channels = int(256 * width)

        def tower() -> nn.Sequential:
            return nn.Sequential(conv(channels, channels, 3), conv(channels, channels, 3))

        self.stems, self.cls_convs, self.reg_convs = (nn.ModuleList() for _ in range(3))
        self.cls_preds, self.reg_preds, self.obj_preds = (nn.ModuleList() for _ in range(3))
        for c_in in (channels, int(512 * width), int(1024 * width)):
            self.stems.append(BaseConv(c_in, channels, 1))
            self.cls_convs.append(tower())
            self.reg_convs.append(tower())
            self.cls_preds.append(nn.Conv2d(channels, num_classes, 1))
            self.reg_preds.append(nn.Conv2d(channels, 4, 1))
            self.obj_preds.append(nn.Conv2d(channels, 1, 1))

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        outputs = []
        for level, x in enumerate(features):
            x = self.stems[level](x)
            cls = self.cls_preds[level](self.cls_convs[level](x))
            reg_feature = self.reg_convs[level](x)
            reg, obj = self.reg_preds[level](reg_feature), self.obj_preds[level](reg_feature)
            outputs.append(torch.cat([reg, obj, cls], 1))
        return torch.cat([output.flatten(2) for output in outputs], 2).permute(0, 2, 1)


class PlainYOLOX(nn.Module):
    """(N,3,H,W) to the raw outputs (N,A,4 + 1 + C): box, objectness, classes of every cell."""

    def __init__(self, *, depth: float, width: float, num_classes: int, depthwise: bool = False):
        super().__init__()
        conv = DWConv if depthwise else BaseConv
        self.backbone = PAFPN(depth, width, conv)
        self.head = Head(num_classes, width, conv)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

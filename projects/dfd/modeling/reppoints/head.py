"""The head of RepPoints: classes and two sets of points of every cell."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from ...ranges import check_choice, check_count
from .deform import DeformConv
from .points import SINGLE_POINT, TRANSFORMS, at_least_float32, points_to_boxes

_PRIOR = 0.01


class RepPointsHead(nn.Module):
    """One head for all levels.

    A first set of points is regressed; at these points features are sampled, from which the
    classes come and the change to the second set. Points are (N,2P,H,W), of each point y, then x,
    in cells of the level, relative to the cell. The keys are those of mmdet's ``bbox_head``.
    """

    def __init__(
        self,
        in_channels: int = 256,
        num_classes: int = 80,
        *,
        feat_channels: int = 256,
        point_feat_channels: int | None = None,
        num_convs: int = 3,
        num_points: int = 9,
        transform: str = "moment",
        gradient_mul: float = 0.1,
        moment_mul: float = 0.01,
        norm: str = "GN",
        norm_groups: int = 32,
    ) -> None:
        """
        Args:
            in_channels: of every level.
            feat_channels: of the two towers.
            point_feat_channels: after the deformable convolutions; None: as many.
            num_convs: convolutions in each tower.
            num_points: P, the square of an odd number.
            transform: from points to a box, see ``points_to_boxes``.
            gradient_mul: of what comes back through the places of the samples, the share that
                reaches the first points.
            moment_mul: the same for ``moment_transfer``.
            norm: of the towers, "GN" or "" for none.
            norm_groups: of "GN".

        Raises:
            UserError: a setting outside its range.
        """
        super().__init__()
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("num_classes", num_classes, 1),
            ("feat_channels", feat_channels, 1),
            ("num_convs", num_convs, 0),
            ("num_points", num_points, 0),
            ("norm_groups", norm_groups, 1),
        ):
            check_count(f"RepPointsHead: {name}", value, least)
        kernel = math.isqrt(num_points)
        if kernel**2 != num_points or kernel % 2 == 0:
            raise UserError(
                f"RepPointsHead: num_points is {num_points}; it must be the square of an odd number"
            )
        check_choice("RepPoints: transform", transform, TRANSFORMS)
        if transform == "moment" and num_points == 1:
            raise UserError(f"RepPointsHead: num_points is 1; {SINGLE_POINT}")
        if norm not in ("", "GN"):
            raise UserError(f'RepPointsHead: norm is {norm!r}; it must be "GN" or ""')
        # A norm would leave nothing of a single channel in a level of one cell.
        if norm and (feat_channels % norm_groups or feat_channels == norm_groups):
            raise UserError(
                f"RepPointsHead: {feat_channels} feat_channels cannot be divided into "
                f"{norm_groups} groups (norm_groups) of several channels"
            )
        self.num_classes = num_classes
        self.transform = transform
        self.gradient_mul, self.moment_mul = gradient_mul, moment_mul
        if transform == "moment":
            self.moment_transfer = nn.Parameter(torch.zeros(2))
        groups = norm_groups if norm else 0
        self.cls_convs = _tower(in_channels, feat_channels, num_convs, groups)
        self.reg_convs = _tower(in_channels, feat_channels, num_convs, groups)
        tower_channels = feat_channels if num_convs else in_channels
        width = point_feat_channels or feat_channels
        self.reppoints_cls_conv = _deform(tower_channels, width, kernel)
        self.reppoints_cls_out = nn.Conv2d(width, num_classes, 1)
        self.reppoints_pts_init_conv = nn.Conv2d(tower_channels, width, 3, padding=1)
        self.reppoints_pts_init_out = nn.Conv2d(width, 2 * num_points, 1)
        self.reppoints_pts_refine_conv = _deform(tower_channels, width, kernel)
        self.reppoints_pts_refine_out = nn.Conv2d(width, 2 * num_points, 1)
        # Where a plain convolution of this kernel samples.
        steps = torch.arange(kernel, dtype=torch.float32) - kernel // 2
        base = torch.cartesian_prod(steps, steps).view(1, -1, 1, 1)
        self.register_buffer("_base", base, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | DeformConv):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.reppoints_cls_out.bias, -math.log((1 - _PRIOR) / _PRIOR))

    def forward(
        self, features: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """
        Args:
            features: of each level (N,C,H,W).

        Returns:
            Of each level, at least in float32: logits of the classes (N,num_classes,H,W), the first
            and the second points (N,2P,H,W).
        """
        levels = [self._level(feature) for feature in features]
        logits, first, second = zip(*levels, strict=True)
        return list(logits), list(first), list(second)

    def _level(self, feature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        classes, places = self.cls_convs(feature), self.reg_convs(feature)
        first = _full(self.reppoints_pts_init_out, F.relu(self.reppoints_pts_init_conv(places)))
        mul = self.gradient_mul
        offset = (1 - mul) * first.detach() + mul * first - self._base
        classes = F.relu(self.reppoints_cls_conv(classes, offset))
        places = F.relu(self.reppoints_pts_refine_conv(places, offset))
        second = _full(self.reppoints_pts_refine_out, places) + first.detach()
        return _full(self.reppoints_cls_out, classes), first, second

    def boxes(self, points: Tensor) -> Tensor:
        """(N,4,H,W) XYXY of points (N,2P,H,W), in their units."""
        transfer = getattr(self, "moment_transfer", None)
        return points_to_boxes(points, self.transform, transfer, self.moment_mul)


def _tower(in_channels: int, channels: int, num_convs: int, groups: int) -> nn.Sequential:
    blocks = []
    for index in range(num_convs):
        conv = nn.Conv2d(
            channels if index else in_channels, channels, 3, padding=1, bias=not groups
        )
        block = nn.Sequential()
        block.add_module("conv", conv)
        if groups:
            block.add_module("gn", nn.GroupNorm(groups, channels))
        block.add_module("relu", nn.ReLU(inplace=True))
        blocks.append(block)
    return nn.Sequential(*blocks)


def _deform(in_channels: int, out_channels: int, kernel: int) -> DeformConv:
    return DeformConv(in_channels, out_channels, kernel, padding=kernel // 2)


def _full(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution without autocast: half a pixel is much for a box, and these are cheap."""
    with torch.autocast(x.device.type, enabled=False):
        return conv(at_least_float32(x))

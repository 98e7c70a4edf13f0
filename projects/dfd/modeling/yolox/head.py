"""YOLOX's decoupled head, and what its raw outputs mean.

Shape shorthand: N images, C classes, A cells of all levels: p3's row by row, then p4's, then p5's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor, nn
from torchvision.ops import box_convert

from .blocks import BaseConv, conv3x3
from .network import LEVELS, level_channels

# Where no object is, nothing holds the log of a side, and a loss needs it finite. In strides,
# beyond any image; Detectron2's transforms of boxes have such a bound too.
_LARGEST_SIDE = math.log(10000)

# A fresh head's probability that a cell holds an object, and that it is of a given class.
PRIOR = 0.01


class Grid(NamedTuple):
    """The cells that predict: one prediction each."""

    cells: Tensor  # (A,2): column and row of the cell on its level, from 0
    strides: Tensor  # (A,): pixels
    sizes: Sequence[tuple[int, int]]  # rows and columns of each level

    @property
    def centres(self) -> Tensor:
        """(A,2): x and y of the cells' centres, pixels."""
        return (self.cells + 0.5) * self.strides[:, None]


class Predictions(NamedTuple):
    """Raw outputs, before any sigmoid."""

    regression: Tensor  # (N,A,4): x and y from the cell's corner in strides, log w and h in strides
    objectness: Tensor  # (N,A)
    classes: Tensor  # (N,A,C)


def make_grid(
    sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device | None = None
) -> Grid:
    """
    Args:
        sizes: rows and columns of each level.
        strides: of each level, pixels.
    """
    cells, cell_strides = [], []
    for (height, width), stride in zip(sizes, strides, strict=True):
        row = torch.arange(height, dtype=torch.float32, device=device)
        column = torch.arange(width, dtype=torch.float32, device=device)
        rows, columns = torch.meshgrid(row, column, indexing="ij")
        cells.append(torch.stack([columns, rows], dim=-1).flatten(0, 1))
        cell_strides.append(torch.full((height * width,), float(stride), device=device))
    return Grid(torch.cat(cells), torch.cat(cell_strides), tuple(sizes))


def decode(regression: Tensor, grid: Grid) -> Tensor:
    """
    Args:
        regression: (...,A,4), float32, for half precision overflows here.

    Returns:
        (...,A,4): centre x, y, width and height, pixels.
    """
    strides = grid.strides[:, None]
    centres = (regression[..., :2] + grid.cells) * strides
    return torch.cat([centres, regression[..., 2:].exp() * strides], dim=-1)


def by_level(
    predictions: Predictions, grid: Grid, boxes: bool
) -> list[tuple[Tensor, Tensor | None]]:
    """Of each level, in fp32: the logits (N,C,H,W) of the scores that rank detections, which are
    class times objectness; and boxes (N,4,H,W), XYXY in pixels, if asked."""
    regression, objectness, classes = (part.float() for part in predictions)
    parts = [logit_of_product(classes, objectness[..., None])]
    if boxes:
        corner, sides = regression.split(2, dim=-1)
        bounded = torch.cat([corner, sides.clamp(max=_LARGEST_SIDE)], dim=-1)
        parts.append(box_convert(decode(bounded, grid), "cxcywh", "xyxy"))
    levels, first = [], 0
    for size in grid.sizes:
        last = first + math.prod(size)
        maps = [x[:, first:last].transpose(1, 2).unflatten(2, size) for x in parts]
        levels.append((maps[0], maps[1] if boxes else None))
        first = last
    return levels


def logit_of_product(a: Tensor, b: Tensor) -> Tensor:
    """The logit of sigmoid(a) sigmoid(b), exact for scores next to 0 or 1 too."""
    # 1 - p of p = exp(log_score); at 1 itself its logarithm would be infinite.
    log_score = (F.logsigmoid(a) + F.logsigmoid(b)).clamp(max=-torch.finfo(a.dtype).eps)
    return log_score - (-torch.expm1(log_score)).log()


class Stems(nn.ModuleList):
    """The first convolution of each level's head, 1x1 to one number of channels.

    A module of its own that runs once in a forward, so that a hook sees all levels: it is here that
    FGD distils YOLOX, after norm and activation.
    """

    def __init__(self, *, width: float, activation: str) -> None:
        levels = level_channels(width)
        super().__init__(BaseConv(c, levels[0], 1, activation=activation) for c in levels)
        self._channels = levels[0]

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=self._channels, stride=stride)
            for name, stride in LEVELS.items()
        }

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Level name to features, for the backbone's."""
        return {name: stem(features[name]) for name, stem in zip(LEVELS, self, strict=True)}


class YOLOXHead(nn.Module):
    """A tower for classes and one for boxes and objectness, on each level with its own weights."""

    def __init__(self, *, num_classes: int, width: float, depthwise: bool, activation: str) -> None:
        super().__init__()
        self.num_classes = num_classes
        channels = level_channels(width)[0]

        def tower() -> nn.Sequential:
            kind = {"depthwise": depthwise, "activation": activation}
            return nn.Sequential(*(conv3x3(channels, channels, **kind) for _ in range(2)))

        def towers() -> nn.ModuleList:
            return nn.ModuleList(tower() for _ in LEVELS)

        def outputs(number: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Conv2d(channels, number, 1) for _ in LEVELS)

        self.cls_convs = towers()
        self.reg_convs = towers()
        self.cls_preds = outputs(num_classes)
        self.reg_preds = outputs(4)
        self.obj_preds = outputs(1)
        self.stems = Stems(width=width, activation=activation)
        for module in (*self.cls_preds, *self.obj_preds):
            nn.init.constant_(module.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, features: dict[str, Tensor]) -> tuple[Predictions, Grid]:
        """
        Args:
            features: level name to the backbone's (N,channels,H,W).
        """
        return self.predict(self.stems(features))

    def predict(self, stems: Mapping[str, Tensor]) -> tuple[Predictions, Grid]:
        """Of the stems' output of each level."""
        classes, regression, objectness, sizes = [], [], [], []
        for i, x in enumerate(stems[name] for name in LEVELS):
            kinds, boxes = self._classes(i, x), self.reg_convs[i](x)
            classes.append(kinds.flatten(2))
            regression.append(self.reg_preds[i](boxes).flatten(2))
            objectness.append(self.obj_preds[i](boxes).flatten(1))
            sizes.append(tuple(x.shape[-2:]))
        predictions = Predictions(
            torch.cat(regression, dim=2).transpose(1, 2),
            torch.cat(objectness, dim=1),
            torch.cat(classes, dim=2).transpose(1, 2),
        )
        return predictions, make_grid(sizes, list(LEVELS.values()), predictions.objectness.device)

    def object_scores(self, stems: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the stems' output of each level, objectness times each class's score: (N,C,H,W)."""
        scores = {}
        for i, name in enumerate(LEVELS):
            objectness = self.obj_preds[i](self.reg_convs[i](stems[name]))
            scores[name] = self._classes(i, stems[name]).sigmoid() * objectness.sigmoid()
        return scores

    def _classes(self, level: int, stem: Tensor) -> Tensor:
        return self.cls_preds[level](self.cls_convs[level](stem))

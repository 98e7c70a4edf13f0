"""Points of objects and of cells.

Shape shorthand: N images, P points of an object, H x W cells of one level, A cells of all levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import UserError
from ...ranges import check_choice

TRANSFORMS = ("moment", "minmax", "partial_minmax")
SINGLE_POINT = "a single point has no standard deviation, of which transform='moment' makes a box"
# partial_minmax uses these and leaves the other points free.
_CORNERS = 4


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision, and integers, in full."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def points_to_boxes(
    points: Tensor, kind: str, moment_transfer: Tensor | None = None, moment_mul: float = 0.01
) -> Tensor:
    """The box that a set of points stands for.

    - "minmax": around all points.
    - "partial_minmax": around the first four.
    - "moment": centred at their mean; half its sides are their standard deviations, each times the
      exponential of an entry of ``moment_transfer``.

    Args:
        points: (N,2P,H,W), of each point y, then x.
        moment_transfer: (2,), of width and height; None: zeros.
        moment_mul: the gradient of ``moment_transfer`` is multiplied by this.

    Returns:
        (N,4,H,W) XYXY in the units of the points, at least in float32.

    Raises:
        UserError: there is no such transform, or a single point is to have a moment.
    """
    check_choice("RepPoints: transform", kind, TRANSFORMS)
    if kind == "moment" and points.shape[1] < 4:
        raise UserError(f"RepPoints: {SINGLE_POINT}")
    y, x = at_least_float32(points).unflatten(1, (-1, 2)).unbind(dim=2)
    if kind == "partial_minmax":
        y, x = y[:, :_CORNERS], x[:, :_CORNERS]
    if kind != "moment":
        # Not amin and amax, which share the gradient out among equal points.
        sides = x.min(dim=1)[0], y.min(dim=1)[0], x.max(dim=1)[0], y.max(dim=1)[0]
        return torch.stack(sides, dim=1)
    half_width, half_height = x.std(dim=1), y.std(dim=1)
    if moment_transfer is not None:
        transfer = at_least_float32(moment_transfer)
        transfer = transfer.detach() * (1 - moment_mul) + transfer * moment_mul
        stretch_x, stretch_y = transfer.exp().unbind()
        half_width, half_height = half_width * stretch_x, half_height * stretch_y
    x, y = x.mean(dim=1), y.mean(dim=1)
    sides = x - half_width, y - half_height, x + half_width, y + half_height
    return torch.stack(sides, dim=1)


def cell_points(
    sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device | str
) -> Tensor:
    """The point of each cell, its upper left corner, level by level and row by row.

    Args:
        sizes: (H,W) of each level.
        strides: pixels per cell of each level.

    Returns:
        (A,3): x and y in pixels of the network's input, and the stride.
    """
    levels = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        rows = torch.arange(height, device=device, dtype=torch.float32) * stride
        columns = torch.arange(width, device=device, dtype=torch.float32) * stride
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        levels.append(torch.stack([x, y, torch.full_like(x, stride)], dim=-1).flatten(0, 1))
    return torch.cat(levels)


def cells_within(points: Tensor, height: int, width: int) -> Tensor:
    """(A,) bool: which cells (A,3) begin within so many pixels."""
    return (points[:, 0] < width) & (points[:, 1] < height)

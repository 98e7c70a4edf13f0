"""Where the labelled boxes lie on a level.

Shape shorthand: N images, H x W cells of one level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Boxes whose cells are marked in one go.
_AT_ONCE = 32


def _between(places: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """(M,S) bool: which of S places are from the start to before the end of each of M ranges."""
    return (places >= starts[:, None]) & (places < ends[:, None])


@torch.no_grad()
def box_masks(
    boxes: Sequence[Tensor] | None, stride: int, like: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights of the cells of boxes and of the others, by which every object counts the same.

    In the cells of a box, 1 over their number (the largest where boxes overlap), else 0; and 1 over
    the number of cells of the image outside of all boxes there, else 0. As in FGD (Yang et al.,
    CVPR 2022), whose boxes are placed by the size of the image, which misplaces them in a padded
    batch.

    Args:
        boxes: N tensors (M,4), XYXY in pixels of the network's input; None: no boxes.
        stride: pixels per cell.
        like: (N,H,W), for size and device.

    Returns:
        M_fg and M_bg, (N,H,W).
    """
    foreground = torch.zeros_like(like)
    rows, columns = (torch.arange(size, device=like.device) for size in like.shape[1:])
    for mask, of_image in zip(foreground, boxes or (), strict=bool(boxes)):
        # Some at a time, so that a crowd of objects does not take the memory of a map each.
        for some in of_image.split(_AT_ONCE) if len(of_image) else ():
            corners = some / stride
            # The cell in which the box ends is in, and if it ends on a border, the next one.
            left, top = corners[:, :2].floor().unbind(dim=1)
            right, bottom = (corners[:, 2:].ceil() + 1).unbind(dim=1)
            share = ((bottom - top) * (right - left)).reciprocal().to(like.dtype)
            down, across = _between(rows, top, bottom), _between(columns, left, right)
            inside = down[:, :, None] & across[:, None, :]
            weights = torch.where(inside, share[:, None, None], 0)
            torch.maximum(mask, weights.amax(dim=0), out=mask)
    background = (foreground == 0).to(like.dtype)
    if valid is not None:
        background = background * valid
    return foreground, background / background.sum(dim=(1, 2), keepdim=True).clamp(min=1)

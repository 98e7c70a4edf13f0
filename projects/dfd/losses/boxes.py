"""Where the labelled boxes lie on a level.

Shape shorthand: N images, H x W cells of one level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    for mask, of_image in zip(foreground, boxes or (), strict=bool(boxes)):
        corners = of_image / stride
        # The cell in which the box ends is in, and if it ends on a border, the next one.
        starts, ends = corners[:, :2].floor().long(), corners[:, 2:].ceil().long() + 1
        for (left, top), (right, bottom) in zip(starts.tolist(), ends.tolist(), strict=True):
            share = 1 / ((bottom - top) * (right - left))
            part = mask[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
            part.clamp_(min=share)
    background = (foreground == 0).to(like.dtype)
    if valid is not None:
        background = background * valid
    return foreground, background / background.sum(dim=(1, 2), keepdim=True).clamp(min=1)

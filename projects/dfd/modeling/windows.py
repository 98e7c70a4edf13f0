"""Square windows of a grid of tokens, for attention that looks no further.

Shape shorthand: N images, H x W tokens, C channels, K windows of s x s tokens.
"""

from __future__ import annotations

import torch
from detectron2.modeling.backbone.utils import window_partition, window_unpartition
from torch import Tensor

# Around the 14 of ViTDet; larger ones cost more attention, smaller ones see less.
_SIZES = range(8, 21)
_PREFERRED = 14


def choose_window(height: int, width: int) -> int:
    """The window for a grid: one that divides both sides, as near to 14 as there is.

    A grid of at most 16 x 16 tokens is one window: 0, every block is global. Where nothing from 8
    to 20 divides it: 14, and each block pads, as Detectron2's ``ViT`` does.
    """
    if max(height, width) <= 16:
        return 0
    fitting = [size for size in _SIZES if height % size == 0 and width % size == 0]
    return min(fitting, key=lambda size: (abs(size - _PREFERRED), -size), default=_PREFERRED)


class TokenOrder:
    """The order in which the tokens of a grid are kept between the blocks.

    If the window divides the grid, tokens are kept window by window: norms and MLPs act on each
    token alone and global attention does not care for their order, so that a windowed block needs
    no copy. Else they are kept row by row, and each windowed block pads and copies.
    """

    def __init__(self, *, height: int, width: int, window: int) -> None:
        """
        Args:
            window: side of the windows in tokens; 0: there are none.
        """
        self.height, self.width, self.window = height, width, window
        self.by_window = window > 0 and height % window == 0 and width % window == 0

    def enter(self, x: Tensor) -> Tensor:
        """(..., H*W, C) row by row to this order."""
        if not self.by_window:
            return x
        grid = x.reshape(-1, self.height, self.width, x.shape[-1])
        return window_partition(grid, self.window)[0].reshape(x.shape)

    def leave(self, x: Tensor) -> Tensor:
        """(N, H*W, C) in this order to (N,H,W,C)."""
        if not self.by_window:
            return x.unflatten(1, (self.height, self.width))
        return self._grid(x)

    def split(self, x: Tensor) -> Tensor:
        """(N, H*W, C) in this order to windows (N,K,s*s,C)."""
        if self.by_window:
            return x.unflatten(1, (-1, self.window**2))
        windows, _ = window_partition(x.unflatten(1, (self.height, self.width)), self.window)
        return windows.reshape(x.shape[0], -1, self.window**2, x.shape[-1])

    def join(self, x: Tensor) -> Tensor:
        """The inverse of ``split``."""
        if self.by_window:
            return x.flatten(1, 2)
        return self._grid(x).flatten(1, 2)

    def _grid(self, x: Tensor) -> Tensor:
        """Tokens window by window, without the padding as (N,H,W,C)."""
        size = self.window
        padded = -(-self.height // size) * size, -(-self.width // size) * size
        windows = x.reshape(-1, size, size, x.shape[-1])
        return window_unpartition(windows, size, padded, (self.height, self.width))


def attend_in_windows(attention, x: Tensor, order: TokenOrder, num_prefix: int, **kwargs) -> Tensor:
    """Attention within windows.

    Every window also sees the prefix tokens (class token, registers). Each prefix token comes out
    once from each window, and is averaged over them.

    Args:
        attention: timm's, from (N,L,C) to (N,L,C).
        x: (N, P + H*W, C), the tokens after the P prefix tokens in ``order``.
        num_prefix: P.
        kwargs: given to ``attention``, such as its rotary table of a window.

    Returns:
        (N, P + H*W, C).
    """
    windows = order.split(x[:, num_prefix:])
    n, count = windows.shape[:2]
    if num_prefix:
        prefix = x[:, None, :num_prefix].expand(-1, count, -1, -1)
        windows = torch.cat([prefix, windows], dim=2)
    out = attention(windows.flatten(0, 1), **kwargs).unflatten(0, (n, count))
    cells = order.join(out[:, :, num_prefix:])
    return torch.cat([out[:, :, :num_prefix].mean(1), cells], dim=1) if num_prefix else cells

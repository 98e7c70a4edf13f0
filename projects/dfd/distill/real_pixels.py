"""Which pixels of a batch show an image, and so which cells of a level count.

Shape shorthand: N images, H x W pixels, h x w cells of one level. A cell at row i, column j of a
level of stride s covers the pixels [i*s, (i+1)*s) x [j*s, (j+1)*s) of the network's input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError

Masks = Sequence[Tensor | None]


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device. To CUDA it goes by pinned memory, so that neither side waits."""
    if torch.device(device).type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class RealPixels:
    """The pixels of a batch that are of an image, not of its padding. Made once a step.

    What they are is copied to the device once, however many levels ask for their cells.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        masks: Masks | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            sizes: (height, width) in pixels of each image, before the batch is padded.
            masks: of each image (height, width) bool, where it shows something and is not filled
                up by an augmentation; None where all of it does, or for all of them.
            device: where cells are wanted.
        """
        self.sizes = [(int(height), int(width)) for height, width in sizes]
        self._masks = masks if masks is not None and any(m is not None for m in masks) else None
        self._device = torch.device(device)
        self._sizes: Tensor | None = None
        # By stride, see _pool.
        self._pooled: dict[int, Tensor] = {}

    @property
    def masked(self) -> bool:
        """Whether some pixels of some image are filled up."""
        return self._masks is not None

    def resized(self, ratio: float, masks: Masks | None = None) -> RealPixels:
        """Those of the same images at ``ratio`` times their size.

        Args:
            masks: of the images at that size, where they are known; else the own ones, resized.
        """
        # Rounded, for the sides of the smaller images were.
        sizes = [(round(height * ratio), round(width * ratio)) for height, width in self.sizes]
        if masks is None and self._masks is not None:
            masks = [
                mask if mask is None else F.interpolate(mask[None, None].float(), size)[0, 0] > 0
                for mask, size in zip(self._masks, sizes, strict=True)
            ]
        if masks is not None:
            sizes = [
                size if mask is None else tuple(mask.shape)
                for mask, size in zip(masks, sizes, strict=True)
            ]
        return RealPixels(sizes, masks, self._device)

    def cells(self, stride: int, height: int, width: int) -> Tensor | None:
        """The cells of a level that have a real pixel.

        Args:
            stride: pixels per cell.
            height, width: cells of the level.

        Returns:
            (N, height, width) bool, or None if every cell is valid. A cell counts as valid if any
            of its pixels belongs to the image, so an image without padding is valid everywhere;
            but not if a mask says that one of them was filled up, for what it was filled with
            would be distilled.
        """
        if self._masks is not None:
            real, filled = self._pool(stride)[..., :height, :width].unbind(dim=1)
            missing = (0, width - real.shape[2], 0, height - real.shape[1])
            return F.pad(real & ~filled, missing)
        last_row, last_column = (height - 1) * stride, (width - 1) * stride
        if all(h > last_row and w > last_column for h, w in self.sizes):
            return None
        if self._sizes is None:
            self._sizes = to_device(torch.tensor(self.sizes), self._device)
        rows = torch.arange(height, device=self._device) * stride
        columns = torch.arange(width, device=self._device) * stride
        inside_rows = rows[None, :] < self._sizes[:, 0, None]
        inside_columns = columns[None, :] < self._sizes[:, 1, None]
        return inside_rows[:, :, None] & inside_columns[:, None, :]

    def _pool(self, stride: int) -> Tensor:
        """(N,2,h,w) bool: whether a pixel of each cell is real, and whether one is filled up."""
        if stride not in self._pooled:
            if not self._pooled:
                self._pooled[1] = to_device(self._canvas(), self._device)
            # The cells of a finer level that make up these are fewer than the pixels.
            finer = max(s for s in self._pooled if stride % s == 0)
            window = stride // finer
            pixels = self._pooled[finer].float()
            self._pooled[stride] = F.max_pool2d(pixels, window, ceil_mode=True) > 0
        return self._pooled[stride]

    def _canvas(self) -> Tensor:
        """(N,2,H,W) bool: real and filled pixels of each image in its corner of the batch."""
        height, width = map(max, zip(*self.sizes, strict=True))
        canvas = torch.zeros(len(self.sizes), 2, height, width, dtype=torch.bool)
        for image, (rows, columns), mask in zip(canvas, self.sizes, self._masks, strict=True):
            real = torch.ones((), dtype=torch.bool) if mask is None else mask
            image[0, :rows, :columns], image[1, :rows, :columns] = real, ~real
        return canvas


def pixel_masks(
    batched_inputs: Sequence[dict], key: str = "valid", image: str = "image"
) -> list[Tensor | None] | None:
    """What the mapper said of the pixels of a batch, see :class:`RealPixels`; None if nothing.

    Args:
        key: of the (H,W) bool mask in an item, which need not be there.
        image: key of the (3,H,W) image that it is of.

    Raises:
        UserError: a mask is not of the size of its image, or not bool.
    """
    if all(item.get(key) is None for item in batched_inputs):
        return None
    masks = []
    for item in batched_inputs:
        mask = item.get(key)
        mask = None if mask is None else torch.as_tensor(mask)
        size = tuple(item[image].shape[-2:])
        if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != size):
            raise UserError(
                f"{key} of {item.get('file_name', 'an image without a file name')} is "
                f"{str(mask.dtype).removeprefix('torch.')} of {tuple(mask.shape)}; the mapper must "
                f"make it bool of {size}, True where {image} shows something"
            )
        masks.append(mask)
    return masks


def image_area(batched_inputs: Sequence[dict]) -> dict:
    """What ``DFDHead`` is told of the pixels of a batch, by the names of its arguments."""
    area = {"image_sizes": [tuple(item["image"].shape[-2:]) for item in batched_inputs]}
    masks = pixel_masks(batched_inputs)
    if masks is not None:
        area["masks"] = masks
        area["teacher_masks"] = pixel_masks(batched_inputs, "teacher_valid", "teacher_image")
    return area

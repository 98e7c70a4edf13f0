"""Both sides of a level on the same cells: resampled, cropped, adapted, and which cells count.

Shape shorthand: N images, C channels, H x W cells of one level, which cover the pixels that
``real_pixels`` tells.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..losses.base import LevelFeatures
from .disparity import mean_of_blocks, zero_outside
from .pairing import LevelPair
from .real_pixels import RealPixels


class PixelsOfBoth(NamedTuple):
    """The real pixels of the student's images and of the teacher's.

    ``resample``: sides of the teacher's maps over those of the student's in a pair.
    """

    own: RealPixels
    of_teacher: RealPixels
    resample: float = 1.0


def level_features(
    pair: LevelPair,
    student: Tensor,
    teacher: Tensor,
    pixels: PixelsOfBoth,
    adapter: nn.Module,
    objectness: Tensor | None = None,
    **more: Any,
) -> LevelFeatures:
    """Student (adapted) and teacher of one level in fp32, on the same cells.

    Args:
        student, teacher: (N,C,H,W) of the level, as either network has it.
        adapter: from the student's channels to the teacher's.
        objectness: (N,H,W) of the teacher's level.
        more: what the criterion is told besides, see :class:`LevelFeatures`.

    Raises:
        UserError: the adapter makes something else.
    """
    sides = pixels.resample, pair.stride, pixels.of_teacher
    teacher, cover = resample(teacher.detach(), *sides)
    student, teacher = crop_to_images(student, teacher, pixels.own.sizes, pair.stride)
    cells = student.shape[-2:]
    valid = pixels.own.cells(pair.stride, *cells)
    if pixels.own.masked:
        # A border that the student's smaller image has lost may be in the teacher's cell.
        if cover is None:
            cover = pixels.of_teacher.cells(pair.teacher_stride, *cells)
        valid = valid & cover[:, : cells[0], : cells[1]]
    if not isinstance(adapter, nn.Identity):
        # Padding is hidden from its kernels, as what lies beyond the map is.
        student = adapter(zero_outside(student, valid))
        expected = (len(teacher), pair.teacher_channels, *cells)
        if not isinstance(student, Tensor) or student.shape != expected:
            found = getattr(student, "shape", None)
            what = type(student).__name__ if found is None else tuple(found)
            raise UserError(
                f"model.head.adapter makes {what} on {pair.name}: it must make {expected}, the "
                "teacher's channels on the student's cells"
            )
    if objectness is not None:
        scores, _ = resample(objectness.float()[:, None], *sides)
        objectness = scores[:, 0, : cells[0], : cells[1]]
    # One memory format for both: arithmetic between two of them is several times slower.
    layout = torch.contiguous_format
    return LevelFeatures(
        student=student.float().contiguous(memory_format=layout),
        teacher=teacher.to(torch.float32, memory_format=layout),
        valid=valid,
        stride=pair.stride,
        objectness=objectness,
        **more,
    )


def pool_level(level: LevelFeatures, stride: int, *, both: bool) -> LevelFeatures:
    """The level on a coarser grid, averaged over blocks of its valid cells; not if it is coarser.

    Args:
        stride: of that grid, a multiple of the level's own.
        both: False: the teacher alone is averaged, and spread again over the level's own cells.
    """
    if stride <= level.stride:
        return level
    size = stride // level.stride
    teacher, valid = mean_of_blocks(level.teacher, level.valid, size)
    if not both:
        rows, columns = level.student.shape[-2:]
        spread = teacher.repeat_interleave(size, 2).repeat_interleave(size, 3)
        return dataclasses.replace(level, teacher=spread[..., :rows, :columns])
    objectness = level.objectness
    if objectness is not None:
        objectness = mean_of_blocks(objectness[:, None], level.valid, size)[0][:, 0]
    return dataclasses.replace(
        level,
        student=mean_of_blocks(level.student, level.valid, size)[0],
        teacher=teacher,
        valid=valid,
        stride=stride,
        objectness=objectness,
    )


def resample(
    teacher: Tensor, ratio: float, stride: int, pixels: RealPixels
) -> tuple[Tensor, Tensor | None]:
    """Bring (N,C,H,W) of a network whose images are ``ratio`` times as large to the smaller grid.

    Bilinear, antialiased where it shrinks. Cells keep their place: cell i of the result covers what
    cells i * ratio to (i + 1) * ratio did. Cells of padding have no part in it; a cell that is made
    of them alone is 0.

    Args:
        stride: of the level, in pixels of either side's own images.
        pixels: of the images on the larger grid's side.

    Returns:
        The maps, and which of their cells (N,H,W) are made of more than padding; None: all.
    """
    if ratio == 1:
        return teacher, None
    valid = pixels.cells(stride, *teacher.shape[-2:])
    if valid is None:
        return _interpolate(teacher.float(), ratio), None
    weights = _interpolate(valid[:, None].float(), ratio)
    inside = _interpolate(zero_outside(teacher.float(), valid), ratio)
    return inside / weights.clamp(min=1e-6), weights[:, 0] > 1e-6


def _interpolate(x: Tensor, ratio: float) -> Tensor:
    return F.interpolate(
        x,
        scale_factor=1 / ratio,
        mode="bilinear",
        antialias=ratio > 1,
        recompute_scale_factor=False,
    )


def crop_to_images(
    student: Tensor, teacher: Tensor, image_sizes: Sequence[tuple[int, int]], stride: int
) -> tuple[Tensor, Tensor]:
    """Crop two (N,C,H,W) maps of one stride to the top-left area that both have and an image fills.

    Images sit in the top-left corner of their padded batch, so equal indices mean equal places,
    whatever either side padded.

    Args:
        image_sizes: (height, width) in pixels of each image before padding.
    """
    rows = math.ceil(max(height for height, _ in image_sizes) / stride)
    columns = math.ceil(max(width for _, width in image_sizes) / stride)
    rows = min(rows, student.shape[-2], teacher.shape[-2])
    columns = min(columns, student.shape[-1], teacher.shape[-1])
    return student[..., :rows, :columns], teacher[..., :rows, :columns]

"""Pairing two feature pyramids: levels by stride, cells by place.

Shape shorthand: N images, C channels, H x W cells of one level, which cover the pixels that
``real_pixels`` tells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor

from ..errors import UserError
from .disparity import zero_outside
from .real_pixels import RealPixels
from .real_pixels import valid_cells as valid_cells

ALIGN = ("stride", "resize")


@dataclass(frozen=True)
class LevelPair:
    """One level that student and teacher share.

    ``name`` is the student's name of the level: losses and metrics carry it. Strides are in pixels
    of either side's own input.
    """

    name: str
    teacher_name: str
    stride: int
    teacher_stride: int
    student_channels: int
    teacher_channels: int


def describe_levels(shapes: Mapping[str, ShapeSpec]) -> str:
    """``p3 (stride 8, 256 channels), p4 (...)``, for messages."""
    return ", ".join(
        f"{name} (stride {shape.stride}, {shape.channels} channels)"
        for name, shape in shapes.items()
    )


def _by_stride(shapes: Mapping[str, ShapeSpec], side: str) -> dict[int, str]:
    names: dict[int, str] = {}
    for name, shape in shapes.items():
        if not shape.stride or not shape.channels:
            raise UserError(
                f"the {side}'s level {name} has stride {shape.stride} and {shape.channels} "
                "channels in its backbone's output_shape(): it must give both"
            )
        if shape.stride in names:
            raise UserError(
                f"the {side}'s levels {names[shape.stride]} and {name} have the same stride "
                f"{shape.stride}, so they cannot be paired by stride: "
                "let its backbone put out one of them"
            )
        names[shape.stride] = name
    return names


def pair_levels(
    student_shapes: Mapping[str, ShapeSpec],
    teacher_shapes: Mapping[str, ShapeSpec],
    levels: Sequence[str] | None = None,
    ratio: float = 1.0,
) -> list[LevelPair]:
    """Pair the levels of two pyramids by stride, finest first.

    Args:
        student_shapes, teacher_shapes: ``backbone.output_shape()`` of either side.
        levels: the student's names of the levels to use; None for every shared stride.
        ratio: the teacher's stride over the student's in a pair: 1 where both see images of one
            size, or the teacher's map will be resampled; else the sides of the teacher's images
            over those of the student's.

    Raises:
        UserError: no stride is shared, or a level in ``levels`` is unknown or has no partner.
    """
    student_names = _by_stride(student_shapes, "student")
    teacher_names = _by_stride(teacher_shapes, "teacher")
    both = f"student: {describe_levels(student_shapes)}; teacher: {describe_levels(teacher_shapes)}"
    if ratio != 1:
        both += (
            f"; the teacher's images are {ratio:g} times as large, so a stride of the student's "
            f"pairs with {ratio:g} times that (model.head.align=resize pairs equal strides)"
        )
    pairs = [
        LevelPair(
            name=name,
            teacher_name=teacher_names[stride * ratio],
            stride=stride,
            teacher_stride=teacher_shapes[teacher_names[stride * ratio]].stride,
            student_channels=student_shapes[name].channels,
            teacher_channels=teacher_shapes[teacher_names[stride * ratio]].channels,
        )
        for stride, name in sorted(student_names.items())
        if stride * ratio in teacher_names
    ]
    if not pairs:
        raise UserError(f"student and teacher share no stride, so nothing can be distilled: {both}")
    if levels is None:
        return pairs
    if len(levels) == 0:
        raise UserError(f"model.head.levels is empty; leave it None for every shared level: {both}")
    missing = [level for level in levels if level not in {pair.name for pair in pairs}]
    if missing:
        raise UserError(f"model.head.levels asks for {missing}, which nothing pairs with: {both}")
    return [pair for pair in pairs if pair.name in levels]


def resample(
    teacher: Tensor,
    ratio: float,
    image_sizes: Sequence[tuple[int, int]],
    stride: int,
    pixels: RealPixels | None = None,
) -> Tensor:
    """Bring (N,C,H,W) of a network whose images are ``ratio`` times as large to the smaller grid.

    Bilinear, antialiased where it shrinks. Cells keep their place: cell i of the result covers what
    cells i * ratio to (i + 1) * ratio did. Cells of padding have no part in it; a cell that is made
    of them alone is 0.

    Args:
        image_sizes: (height, width) of each image on the smaller grid's side, in its pixels.
        stride: of the level, in pixels of either side's own images.
        pixels: of the images on the larger grid's side; None: those of ``image_sizes``, resized.
    """
    return resample_with_cover(teacher, ratio, image_sizes, stride, pixels)[0]


def resample_with_cover(
    teacher: Tensor,
    ratio: float,
    image_sizes: Sequence[tuple[int, int]],
    stride: int,
    pixels: RealPixels | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As ``resample``, and which cells (N,H,W) are made of more than padding; None: all."""
    if ratio == 1:
        return teacher, None
    if pixels is None:
        pixels = RealPixels(image_sizes, device=teacher.device).resized(ratio)
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

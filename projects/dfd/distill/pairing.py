"""Pairing the levels of two detectors by their strides, on their pyramids and in their trunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from detectron2.layers import ShapeSpec

from ..errors import UserError


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


def pair_detectors(
    student: Mapping[str, ShapeSpec],
    teacher: Mapping[str, ShapeSpec],
    student_trunk: Mapping[str, ShapeSpec],
    teacher_trunk: Mapping[str, ShapeSpec],
    levels: Sequence[str] | None = None,
    ratio: float = 1.0,
) -> list[LevelPair]:
    """The pairs of the pyramids, then those of the trunks, as far as ``levels`` asks for them.

    Args:
        student, teacher: of the pyramids; a teacher may have none.
        student_trunk, teacher_trunk: of the trunks; empty: they are not distilled.
        levels, ratio: see :func:`pair_levels`.

    Raises:
        UserError: as :func:`pair_levels`, or a name is of a level of both.
    """
    for who, shapes, trunk in (
        ("student", student, student_trunk),
        ("teacher", teacher, teacher_trunk),
    ):
        if both := set(shapes) & set(trunk):
            raise UserError(
                f"the {who}'s trunk and pyramid both call a level {min(both)}: give the "
                "trunk's another name (out_feature)"
            )
    of_pyramid = of_trunk = levels
    if levels is not None:
        unknown = [level for level in levels if level not in {*student, *student_trunk}]
        if student_trunk and unknown:
            raise UserError(
                f"model.head.levels asks for {unknown}, but the student has "
                f"{', '.join(student)}, and {', '.join(student_trunk)} in its trunk"
            )
        of_trunk = [level for level in levels if level in student_trunk]
        of_pyramid = [level for level in levels if level not in student_trunk]
        if of_pyramid and not teacher:
            raise UserError(
                f"model.head.levels asks for {of_pyramid}, but the teacher has nothing beside "
                f"the student's pyramid: it has {', '.join(student_trunk)} of the trunk"
            )
    pairs = []
    # A teacher may have nothing beside the pyramid (FrozenBackbone).
    if (of_pyramid or not of_trunk) and (teacher or not student_trunk):
        pairs += pair_levels(student, teacher, of_pyramid, ratio)
    if student_trunk and (of_trunk or of_trunk is None):
        pairs += pair_levels(student_trunk, teacher_trunk, of_trunk, ratio)
    if not pairs:
        raise UserError("model.head.levels is empty; leave it None for every shared level")
    return pairs

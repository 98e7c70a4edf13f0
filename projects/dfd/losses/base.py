"""What every criterion is given, and how it is called."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError

# A logit below any feature, far enough from the end of fp32 that differences stay within it.
_LOWEST = torch.finfo(torch.float32).min / 4


@dataclass(frozen=True)
class LevelFeatures:
    """One level of the student's pyramid beside the same level of the teacher's.

    Attributes:
        student, teacher: (N,C,H,W) fp32; the teacher's carries no gradient. They may be anything
            where they are not valid, inf and NaN too: ``zero_outside`` hides that.
        valid: (N,H,W) bool, the cells that lie on real pixels; None if all do.
        boxes: N tensors (M,4), the labelled boxes as XYXY in pixels of the network's input; None
            if there are none.
        stride: pixels per cell.
        iteration: of the training, from 0.
        max_iter: how many iterations the training has; None where that is not known.
        objectness: (N,H,W), how sure the teacher is of an object at a cell, from 0 to 1, see
            ``distill.objectness``; None unless the criterion sets ``needs_objectness``.

    Raises:
        ValueError: shapes that broadcasting would silently make something else of.
    """

    student: Tensor
    teacher: Tensor
    valid: Tensor | None = None
    boxes: Sequence[Tensor] | None = None
    stride: int = 1
    objectness: Tensor | None = None
    iteration: int = 0
    max_iter: int | None = None

    def __post_init__(self) -> None:
        if self.student.dim() != 4 or self.student.shape != self.teacher.shape:
            raise ValueError(
                "student and teacher must be (N,C,H,W) of one shape, "
                f"got {tuple(self.student.shape)} and {tuple(self.teacher.shape)}"
            )
        object.__setattr__(self, "teacher", self.teacher.detach())
        for name, dtype in (("valid", torch.bool), ("objectness", None)):
            self._check_map(name, dtype)

    def _check_map(self, name: str, dtype: torch.dtype | None) -> None:
        value, shape = getattr(self, name), tuple(self.student[:, 0].shape)
        if value is None:
            return
        if tuple(value.shape) != shape or dtype not in (None, value.dtype):
            kind = "" if dtype is None else f"{str(dtype).removeprefix('torch.')} of shape "
            raise ValueError(
                f"{name} must be {kind}{shape}, got {value.dtype} of {tuple(value.shape)}"
            )


class FeatureCriterion(nn.Module):
    """A loss between one level of the student's pyramid and the same level of the teacher's.

    A subclass implements ``forward(self, level)`` and is called as ``criterion(level)`` with a
    :class:`LevelFeatures`, or with its fields: ``criterion(student, teacher, valid)``. One whose
    ``forward`` takes the fields themselves (student, teacher, valid, boxes, stride) works too.

    It returns a scalar; exactly zero, with a gradient of zero, if no cell is valid. No gradient
    may reach a cell that is not. Numbers worth logging go to ``stats``, a dict of detached scalars.

    One with ``needs_objectness`` is given the teacher's objectness. One that sets ``needs_boxes``
    to False may be given None for boxes that there are, which saves their way to the device.
    """

    needs_objectness = False
    needs_boxes = True
    _takes_fields = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._takes_fields = _takes_fields(cls)

    def __init__(self) -> None:
        super().__init__()
        self.stats: dict[str, Tensor] = {}

    def __call__(self, *fields: Any, **named: Any) -> Tensor:
        whole = len(fields) == 1 and isinstance(fields[0], LevelFeatures) and not named
        level = fields[0] if whole else LevelFeatures(*fields, **named)
        if not self._takes_fields:
            return super().__call__(level)
        more = {"objectness": level.objectness} if self.needs_objectness else {}
        return super().__call__(
            level.student, level.teacher, level.valid, level.boxes, level.stride, **more
        )

    def set_channels(self, channels: int) -> None:
        """Told once the number of channels C, before the optimizer is built."""

    def forward(self, level: LevelFeatures) -> Tensor:
        raise NotImplementedError


def _takes_fields(criterion: type[FeatureCriterion]) -> bool:
    """Whether a class's ``forward`` takes the fields of a level: all but one argument needed."""
    _, *parameters = inspect.signature(criterion.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return len(needed) != 1


def check_criterion(criterion: Any) -> None:
    """
    Raises:
        UserError: it is no criterion, or its ``forward`` cannot be called as one.
    """
    name = type(criterion).__name__
    if not isinstance(criterion, FeatureCriterion):
        raise UserError(
            f"model.head.criterion is a {name}: derive it from dfd.losses.FeatureCriterion"
        )
    remedy = "define forward(self, level), and take level.student, level.teacher and so on"
    if not criterion._takes_fields:
        return
    for base in type(criterion).__mro__:
        if base is FeatureCriterion:
            break
        if "forward" in vars(base) and not base._takes_fields:
            raise UserError(
                f"{name}.forward takes student, teacher and so on, but that of {base.__name__}, "
                f"from which it derives, takes a level: {remedy}"
            )
    more = {"objectness": None} if criterion.needs_objectness else {}
    try:
        inspect.signature(criterion.forward).bind(*[None] * 5, **more)
    except TypeError as error:
        raise UserError(
            f"{name}.forward cannot be given student, teacher, valid, boxes, stride"
            f"{' and objectness=' if more else ''} ({error}): {remedy}"
        ) from error


def objectness_of(level: LevelFeatures, owner: str) -> Tensor:
    """The teacher's objectness, (N,H,W), 0 where cells are not valid.

    Raises:
        ValueError: the level has none.
    """
    if level.objectness is None:
        raise ValueError(f"{owner} needs objectness, (N,H,W)")
    if level.valid is None:
        return level.objectness
    return level.objectness.masked_fill(~level.valid, 0)


def sum_over_cells(cost: Tensor, valid: Tensor | None) -> Tensor:
    """The sum of a finite (N,H,W) map over the valid cells."""
    return cost.sum() if valid is None else torch.where(valid, cost, 0).sum()


def mean_over_cells(cost: Tensor, valid: Tensor | None) -> Tensor:
    """The mean of an (N,H,W) map over the valid cells of the batch; 0 if there are none."""
    if valid is None:
        return cost.mean()
    return sum_over_cells(cost, valid) / valid.sum().clamp(min=1)


def hide_invalid(logits: Tensor, valid: Tensor | None) -> Tensor:
    """Keep what is not valid out of a softmax over cells; ``valid`` broadcasts to the logits.

    Not by -inf: the exponential is exactly 0 all the same beside any feature, 0 times its finite
    logarithm is 0, and an image without a valid cell gives no NaN.
    """
    return logits if valid is None else logits.masked_fill(~valid, _LOWEST)

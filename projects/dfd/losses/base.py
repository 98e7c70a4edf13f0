"""The signature that every criterion has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import UserError

# A logit below any feature, far enough from the end of fp32 that differences stay within it.
_LOWEST = torch.finfo(torch.float32).min / 4


class FeatureCriterion(nn.Module):
    """A loss between one level of the student's pyramid and the same level of the teacher's.

    Called as ``criterion(student, teacher, valid, boxes, stride)``:

    * ``student``, ``teacher``: (N,C,H,W) fp32; the teacher's carries no gradient.
    * ``valid``: (N,H,W) bool, the cells that lie on real pixels; None if all do.
    * ``boxes``: a list of N tensors (M,4), the labelled boxes as XYXY in pixels of the network's
      input; None if there are none.
    * ``stride``: pixels per cell.

    One with ``needs_objectness`` is also given ``objectness=``, (N,H,W): how sure the teacher's
    proposal generator is of an object at a cell, from 0 to 1.

    One that sets ``needs_boxes`` to False may be given None for boxes that there are, which saves
    their way to the device.

    Features may be anything where they are not valid, inf and NaN too (``zero_outside`` hides
    them), and no gradient goes there. It returns a scalar; exactly zero, with a gradient of zero,
    if no cell is valid. It may leave numbers worth logging in ``stats``, a dict of detached
    scalars.
    """

    needs_objectness = False
    needs_boxes = True

    def __init__(self) -> None:
        super().__init__()
        self.stats: dict[str, Tensor] = {}

    def set_channels(self, channels: int) -> None:
        """Told once the number of channels C, before the optimizer is built."""

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        valid: Tensor | None = None,
        boxes: Sequence[Tensor] | None = None,
        stride: int = 1,
    ) -> Tensor:
        raise NotImplementedError


def check_shapes(student: Tensor, teacher: Tensor, valid: Tensor | None) -> None:
    """Refuse what broadcasting would silently make something else of."""
    if student.dim() != 4 or student.shape != teacher.shape:
        raise ValueError(
            "student and teacher must be (N,C,H,W) of one shape, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if valid is None:
        return
    if valid.dtype != torch.bool or valid.shape != student[:, 0].shape:
        raise ValueError(
            f"valid must be bool of shape {tuple(student[:, 0].shape)}, "
            f"got {valid.dtype} of {tuple(valid.shape)}"
        )


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


def non_negative(owner: str, **setting: float) -> float:
    """The value of one setting, refused with its name if it is negative or not a number."""
    ((name, value),) = setting.items()
    if not value >= 0:
        raise UserError(f"{owner}({name}={value}): it must not be negative")
    return value

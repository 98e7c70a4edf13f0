"""The exponential moving average (EMA) of the student, a second student that is not trained."""

from __future__ import annotations

import math
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..state.checkpoint import StudentCheckpointer


class StudentEMA:
    """A copy of the student whose weights follow it: ema = decay ema + (1 - decay) student.

    Without a warm-up the first update copies, so that it begins with the student's weights after
    one step. With one, it begins with those before the first step, and update n, from 1, has
    ``decay * (1 - exp(-n / warmup))`` for its decay, as in YOLOX. Running statistics of norm layers
    are averaged as weights are, since they have to be those of the averaged weights; whole numbers
    are copied. Same device and precision (fp32) as the student's.
    """

    # A run that is continued may begin with it.
    optional = True

    def __init__(self, student: nn.Module, decay: float, warmup: float | None = None) -> None:
        """
        Args:
            decay: above 0, below 1.
            warmup: above 0, in updates; None: there is none.
        """
        self._averaged = AveragedModel(
            student, multi_avg_fn=_average(decay, warmup), use_buffers=True
        )
        self._warms_up = warmup is not None
        # It counts the student's states that were taken in, of which the first is copied.
        self._averaged.n_averaged.fill_(int(self._warms_up))
        self.model.requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The averaged student, a detector as the student is."""
        return self._averaged.module

    def begin(self, student: nn.Module) -> None:
        """Take the weights of a student before its first step; nothing if there was an update."""
        if self._averaged.n_averaged == int(self._warms_up):
            self.model.load_state_dict(student.state_dict())

    def update(self, student: nn.Module) -> None:
        """Take in the student's weights, after each of its steps."""
        self._averaged.update_parameters(student)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "updates": int(self._averaged.n_averaged)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self._averaged.n_averaged.fill_(state["updates"])


def _average(decay: float, warmup: float | None) -> Any:
    """torch's own average, but not of whole numbers, which it would cut.

    It is given how many states there were before, so with a warm-up the number of the update.
    """

    @torch.no_grad()
    def average(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        if averaged[0].is_floating_point():
            grown = 1.0 if warmup is None else 1 - math.exp(-int(count) / warmup)
            get_ema_multi_avg_fn(decay * grown)(averaged, current, count)
        else:
            for kept, new in zip(averaged, current, strict=True):
                kept.copy_(new)

    return average


class UpdateEMA(HookBase):
    """Updates the EMA after each step, before anything evaluates it; saves it when a run has ended.

    In every process. ``model_ema.pth`` is a plain student checkpoint.
    """

    def __init__(
        self, ema: StudentEMA, student: nn.Module, checkpointer: StudentCheckpointer
    ) -> None:
        self._ema = ema
        self._student = student
        self._checkpointer = checkpointer

    def before_train(self) -> None:
        self._ema.begin(self._student)  # Its weights were loaded after the EMA was made.

    def after_step(self) -> None:
        self._ema.update(self._student)

    def after_train(self) -> None:
        if comm.is_main_process() and self.trainer.iter >= self.trainer.max_iter:
            self._checkpointer.export(
                "model_ema", self._ema.model, iteration=self.trainer.max_iter - 1
            )

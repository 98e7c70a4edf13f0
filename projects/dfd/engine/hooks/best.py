"""What follows a metric: the best checkpoint, and the end of a run that has stopped to improve."""

from __future__ import annotations

import logging
import math
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from ...errors import UserError
from ..state.checkpoint import StudentCheckpointer

logger = logging.getLogger("dfd")


class Best:
    """The best value that a metric has had in a run, and what came after it."""

    # A run that is continued may begin with it.
    optional = True

    def __init__(self, *, metric: str, mode: str = "max", min_delta: float = 0.0) -> None:
        """
        Args:
            metric: its name in metrics.json.
            mode: "max" or "min", which is better.
            min_delta: a value has to be better by more than this; >= 0.
        """
        self.metric = metric
        self.mode = mode
        self._min_delta = min_delta
        self.clear()

    def clear(self) -> None:
        """Forget what has been measured."""
        self.value: float | None = None
        self.iterations: int | None = None  # That had been done.
        self.waited = 0  # Evaluations since.

    def update(self, value: float, iterations: int) -> bool:
        """Whether a new value is the best so far. One that is no finite number never is."""
        gain = math.inf if self.value is None else value - self.value
        gain = -gain if self.mode == "min" and self.value is not None else gain
        if not math.isfinite(value) or not gain > self._min_delta:
            self.waited += 1
            return False
        self.value, self.iterations, self.waited = value, iterations, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "mode": self.mode,
            "value": self.value,
            "iterations": self.iterations,
            "waited": self.waited,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if (state["metric"], state["mode"]) != (self.metric, self.mode):
            logger.warning(
                "--resume: the run followed %s (%s); %s (%s) begins anew",
                state["metric"],
                state["mode"],
                self.metric,
                self.mode,
            )
            self.clear()
            return
        self.value, self.iterations = state["value"], state["iterations"]
        self.waited = state["waited"]


class _FollowsMetric(HookBase):
    """Reads a metric whenever it has been computed; to be placed after what computes it."""

    def __init__(self, best: Best, period: int) -> None:
        """
        Args:
            period: of what computes the metric, in iterations; 0: when the run has ended.
        """
        self._best = best
        self._period = period

    def _due(self) -> bool:
        """Whether the metric is new after this step. The last time is after training instead."""
        done = self.trainer.iter + 1
        return self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter

    def _new_value(self) -> float:
        storage = self.trainer.storage
        values = _metrics(storage)
        if self._best.metric not in values:
            raise UserError(
                f"there is no metric {self._best.metric!r}, which train.best_checkpoint or "
                f"train.early_stop asks for: there are {', '.join(sorted(values)) or 'none'}"
            )
        value = values[self._best.metric]
        if not math.isfinite(value):
            logger.warning("%s is %s: it does not count as better", self._best.metric, value)
        return value


def _metrics(storage: EventStorage) -> dict[str, float]:
    """What evaluations have just put into a storage, by name."""
    hints = storage.smoothing_hints()
    return {
        name: value
        for name, (value, iteration) in storage.latest().items()
        if iteration == storage.iter and not hints[name] and ("/" in name or name == "val_loss")
    }


class BestCheckpoint(_FollowsMetric):
    """Keeps the student that was best by a metric in ``model_best.pth``, a plain checkpoint.

    In the main process, which alone knows the metric.
    """

    def __init__(
        self, best: Best, period: int, model: nn.Module, checkpointer: StudentCheckpointer
    ) -> None:
        """
        Args:
            model: what the metric is of: the student, or its EMA.
        """
        super().__init__(best, period)
        self._model = model
        self._checkpointer = checkpointer

    def after_step(self) -> None:
        if self._due():
            self._keep_if_best(self.trainer.iter + 1)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._keep_if_best(self.trainer.max_iter)

    def _keep_if_best(self, iterations: int) -> None:
        best = self._best
        if not best.update(self._new_value(), iterations):
            return
        if iterations < self.trainer.max_iter:
            self._checkpointer.set_best_aside()
        logger.info("Best %s so far: %.5g", best.metric, best.value)
        self._checkpointer.export(
            "model_best",
            self._model,
            iteration=iterations - 1,
            metric={"name": best.metric, "value": best.value},
        )


class EarlyStop(_FollowsMetric):
    """Ends a run whose metric has not been better for so many evaluations.

    The run ends as if ``train.max_iter`` had been that iteration. In every process: the main one
    decides, and all of them end after the same step. Before the hooks that do something in the
    last step.
    """

    def __init__(self, best: Best, period: int, patience: int) -> None:
        super().__init__(best, period)
        self._patience = patience

    def after_step(self) -> None:
        if not self._due():
            return
        best, done = self._best, self.trainer.iter + 1
        if comm.is_main_process():
            best.update(self._new_value(), done)
        if comm.all_gather(best.waited)[0] >= self._patience:
            logger.info(
                "Early stop after %d of %d iterations: %s has not been better for %d evaluations%s",
                done,
                self.trainer.max_iter,
                best.metric,
                self._patience,
                f" than {best.value:.5g} after {best.iterations}" if best.iterations else "",
            )
            self.trainer.max_iter = done

    def after_train(self) -> None:
        # A run that is made longer has had this evaluation, if it was a regular one. One that was
        # stopped early has counted it.
        best, done = self._best, self.trainer.iter
        regular = self._period > 0 and done % self._period == 0 and done == self.trainer.max_iter
        if regular and best.waited < self._patience and comm.is_main_process():
            best.update(self._new_value(), done)

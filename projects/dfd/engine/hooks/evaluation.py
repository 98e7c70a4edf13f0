"""Evaluation while a run goes on: metrics, and the student's own loss on the test data."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

from ..checkpoint import kept_random_state
from ..evaluate import share_buffers

_SEED = 0
# What behaves otherwise in training than in evaluation, but gives no losses.
_LAYERS = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.MultiheadAttention,
    DropPath,
    StochasticDepth,
)


class Evaluation(hooks.EvalHook):
    """Detectron2's, which neither evaluates the same weights twice nor draws from the run's stream.

    So a run's weights do not depend on how often it is evaluated.
    """

    def __init__(self, period: int, function: Callable[[], dict[str, Any]]) -> None:
        super().__init__(period, self._evaluate)
        self._function = function
        self._results: dict[str, Any] = {}
        self._done: int | None = None  # Iterations before the last evaluation.

    def _evaluate(self) -> dict[str, Any]:
        # After training, iter is max_iter. A run that was stopped early has just been evaluated.
        done = min(self.trainer.iter + 1, self.trainer.max_iter)
        if done != self._done:
            with kept_random_state():
                self._results = self._function()
            self._done = done
        return self._results

    def after_train(self) -> None:
        super().after_train()
        del self._function


class ValidationLoss:
    """The student's own losses on labelled data, the mean over the images that have objects.

    Each image is a batch of its own, so that the mean depends neither on the order nor on the
    number of processes. Detectors give losses in training mode only, so a copy of the student is
    put into that mode, but for its backbone, norm layers (running statistics) and dropout, which
    are as in evaluation. In fp32; what the detector samples is the same every time. The student and
    what is logged of its training are not touched; the random generators are, which Evaluation puts
    back.
    """

    def __init__(
        self, student: nn.Module, loader: Iterable[list[dict]], num_images: int | None = None
    ) -> None:
        """
        Args:
            loader: gives records with "instances", dealt out over the processes.
            num_images: so many at most, over all processes; None: all.
        """
        self._student = student
        self._loader = loader
        self._limit = math.inf
        if num_images is not None:
            self._limit = math.ceil(num_images / comm.get_world_size())

    def __call__(self) -> dict[str, Any]:
        """``val_loss`` and, in ``val``, its terms; empty but in the main process."""
        sums, count = self._sums()
        gathered = comm.gather((sums, count))
        if not comm.is_main_process():
            return {}
        total = sum(count for _, count in gathered)
        names = sorted({name for sums, _ in gathered for name in sums})
        terms = {n: sum(sums.get(n, 0.0) for sums, _ in gathered) / total for n in names}
        return {"val_loss": sum(terms.values()), "val": terms}

    @torch.no_grad()
    def _sums(self) -> tuple[dict[str, float], int]:
        """The losses summed over this process's images, and how many there were."""
        # A copy, since training mode changes more than weights: running statistics, and numbers
        # that some detectors keep beside them, such as RetinaNet's normaliser.
        student = _losses_without_training(copy.deepcopy(self._student))
        share_buffers(student)
        sums: dict[str, float] = {}
        count = 0
        torch.manual_seed(_SEED)
        # Detectors log what they sample: not into the run's metrics.
        with EventStorage():
            for item in (item for items in self._loader for item in items):
                if len(item.get("instances", ())) == 0:
                    continue
                if count >= self._limit:
                    break
                for name, loss in student([item]).items():
                    sums[name] = sums.get(name, 0.0) + float(loss)
                count += 1
        return sums, count


def _losses_without_training(detector: nn.Module) -> nn.Module:
    """Put a detector where it gives losses and yet computes as in evaluation."""
    detector.train()
    detector.backbone.eval()
    for module in detector.modules():
        if isinstance(module, _LAYERS):
            module.eval()
    return detector

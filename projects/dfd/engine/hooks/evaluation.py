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

from ...distill.processes import own_divisors, share_buffers
from ..state.random_state import kept_random_state

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

    Each image is a batch of its own, drawn for by the same random numbers and, in a detector with a
    running mean of its positives (RetinaNet, FCOS), divided by its own number of them. So the value
    depends on the weights and the images alone: not on their order, the number of processes, or
    what the run has seen before. Detectors give losses in training mode only, so a copy of the
    student is put into that mode, but for its backbone, norm layers (running statistics) and
    dropout, which are as in evaluation. In fp32. The student and what is logged of its training are
    not touched; the random generators are, which Evaluation puts back.
    """

    def __init__(
        self, student: nn.Module, loader: Iterable[list[dict]], num_images: int | None = None
    ) -> None:
        """
        Args:
            loader: gives records with "instances", dealt out over the processes so that the first
                has the first ones, as Detectron2's InferenceSampler does.
            num_images: the first so many of all processes' images; None: all.
        """
        self._student = student
        self._loader = loader
        self._limit = math.inf if num_images is None else num_images

    def __call__(self) -> dict[str, Any]:
        """``val_loss`` and, in ``val``, its terms; empty but in the main process."""
        losses = self._losses()
        before = sum(comm.all_gather(len(losses))[: comm.get_rank()])
        if before + len(losses) > self._limit:
            losses = losses[: max(0, int(self._limit) - before)]
        names = {name for image in losses for name in image}
        # Exactly rounded, so that it has no order.
        sums = {name: math.fsum(image.get(name, 0.0) for image in losses) for name in names}
        gathered = comm.gather((sums, len(losses)))
        if not comm.is_main_process():
            return {}
        total = sum(count for _, count in gathered)
        names = sorted({name for sums, _ in gathered for name in sums})
        terms = {n: math.fsum(sums.get(n, 0.0) for sums, _ in gathered) / total for n in names}
        return {"val_loss": math.fsum(terms.values()), "val": terms}

    @torch.no_grad()
    def _losses(self) -> list[dict[str, float]]:
        """The losses of each of this process's images, of as many as may be asked for."""
        student = _losses_without_training(_copy_but_weights(self._student))
        share_buffers(student)
        losses: list[dict[str, float]] = []
        # Detectors log what they sample: not into the run's metrics.
        with EventStorage():
            for item in (item for items in self._loader for item in items):
                if len(item.get("instances", ())) == 0:
                    continue
                if len(losses) >= self._limit:
                    break
                torch.manual_seed(_SEED)
                # Training mode changes more than weights, which must not reach the next image.
                found = _copy_but_weights(student)([item])
                losses.append({name: float(loss) for name, loss in found.items()})
        return losses


def _copy_but_weights(detector: nn.Module) -> nn.Module:
    """A copy with the same parameters, but buffers and whatever else it keeps of its own."""
    return copy.deepcopy(detector, {id(p): p for p in detector.parameters()})


def _losses_without_training(detector: nn.Module) -> nn.Module:
    """Put a detector where it gives losses and yet computes as in evaluation."""
    detector.train()
    detector.backbone.eval()
    for module in detector.modules():
        if isinstance(module, _LAYERS):
            module.eval()
    own_divisors(detector)
    return detector

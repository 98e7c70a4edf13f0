"""The steps of a dry run, and what they have shown."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from detectron2.utils import comm

from ..build import Run
from ..machine import peak_memory_mib

# Steps after the first, which alone pays for starting up; fewer if they take long.
_MORE_STEPS = 4
_MORE_SECONDS = 10.0


@dataclass(frozen=True)
class Measured:
    """What the steps of a dry run have shown.

    Attributes:
        scalars: of the first step, as the training loop logs them.
        without_gradient: trainable parameters that the first step gave none.
        zero_gradient: those whose gradient was exactly 0.
        first_seconds: of the first step, data included.
        seconds: median of the steps after it; of the first if there was no time for others.
        steps: so many were made.
        peak_memory_mib: after them.
    """

    scalars: dict[str, float]
    without_gradient: list[str]
    zero_gradient: list[str]
    first_seconds: float
    seconds: float
    steps: int
    peak_memory_mib: float


def measure_steps(run: Run, device: str) -> Measured:
    """Train a few steps, of which the first is looked at."""
    trainer, iteration = run.trainer, run.start

    def step(iteration: int) -> float:
        start = time.perf_counter()
        trainer.train(iteration, iteration + 1)
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    first = step(iteration)
    scalars = {name: value for name, (value, _) in trainer.storage.latest().items()}
    trainable = {n: p.grad for n, p in run.model.named_parameters() if p.requires_grad}
    without = [name for name, gradient in trainable.items() if gradient is None]
    zero = [name for name, g in trainable.items() if g is not None and not g.any()]
    # Every process makes the same number, or one would wait for another.
    slowest = max(comm.all_gather(first))
    more = min(_MORE_STEPS, int(_MORE_SECONDS / slowest))
    times = [step(iteration + 1 + i) for i in range(more)] or [first]
    return Measured(
        scalars, without, zero, first, statistics.median(times), 1 + more, peak_memory_mib()
    )

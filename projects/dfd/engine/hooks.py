"""Hooks of the training loop beside Detectron2's own."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from collections.abc import Callable
from typing import Any

import cv2
import torch
from detectron2.engine import HookBase
from detectron2.utils.file_io import PathManager

from ..disparity_image import draw_disparity
from ..distiller import DistilledDetector


def peak_memory_mib() -> float:
    """Peak memory of this process so far: CUDA's allocator where it is used, else resident set."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        with open("/proc/self/status") as f:
            peak = next(line for line in f if line.startswith("VmHWM:"))
        return int(peak.split()[1]) / 2**10
    except (OSError, StopIteration):
        # Not Linux. (There, ru_maxrss would count what the parent held when it forked.)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def processor_name(device: str) -> str:
    """The name of the GPU or CPU that a device is; empty if it cannot be told."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as f:
            line = next(line for line in f if line.startswith("model name"))
        return line.partition(":")[2].strip()
    except (OSError, StopIteration):
        return platform.processor()


class DisparityImages(HookBase):
    """Pictures of the disparity on a few fixed images, so that they compare over time.

    Before the first iteration, every ``period`` iterations, and after the last: into
    ``<output_dir>/disparity/<iteration>.png`` and TensorBoard.
    """

    def __init__(
        self,
        model: DistilledDetector,
        batched_inputs: list[dict],
        period: int,
        output_dir: str,
    ) -> None:
        self._model = model
        self._batch = batched_inputs
        self._period = period
        self._folder = os.path.join(output_dir, "disparity")

    def before_train(self) -> None:
        if self.trainer.iter == 0:
            self._draw(0)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or done % self._period == 0:
            self._draw(done)

    def _draw(self, iteration: int) -> None:
        maps = self._model.disparity_maps(self._batch)
        picture = draw_disparity(self._batch, maps, self._model.input_format)
        PathManager.mkdirs(self._folder)
        cv2.imwrite(os.path.join(self._folder, f"{iteration:07d}.png"), picture[:, :, ::-1])
        self.trainer.storage.put_image(
            "disparity", torch.from_numpy(picture.copy()).permute(2, 0, 1)
        )


class RunSummary(HookBase):
    """Writes ``summary.json`` when the run has ended: what a table about it needs.

    Time and memory are those of this process: after a resume, of the last part of the run.
    """

    def __init__(self, output_dir: str, facts: Callable[[], dict[str, Any]]) -> None:
        """
        Args:
            facts: called at the end; its dict is the summary, with time and memory added.
        """
        self._path = os.path.join(output_dir, "summary.json")
        self._facts = facts

    def after_step(self) -> None:
        self.trainer.storage.put_scalar("peak_memory_mib", peak_memory_mib(), smoothing_hint=False)

    def after_train(self) -> None:
        finished = self.trainer.iter >= self.trainer.max_iter
        if not finished or self.trainer.start_iter >= self.trainer.max_iter:
            return  # The run failed, or there was nothing left to do.
        summary = {
            "iterations": self.trainer.max_iter,
            "seconds_per_iteration": self._median("time"),
            "peak_memory_mib": round(peak_memory_mib()),
            **self._facts(),
        }
        with PathManager.open(self._path, "w") as f:
            json.dump(summary, f, indent=2)

    def _median(self, name: str) -> float | None:
        history = self.trainer.storage.histories().get(name)
        return None if history is None else history.median(10**6)

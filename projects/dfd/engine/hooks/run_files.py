"""Hooks that leave a run's files: checkpoints, pictures of the disparity, the summary."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable
from typing import Any

import cv2
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ...distill.detector import DistilledDetector
from ..machine import peak_memory_mib
from ..state.checkpoint import FINAL, StudentCheckpointer
from ..state.files import whole_file
from ..stop import Stopped, StopRequest
from .disparity_image import draw_disparity

logger = logging.getLogger("dfd")


class Checkpoints(HookBase):
    """Saves the run every ``period`` iterations and after the last; keeps the last few files.

    Where the run is asked to stop, it saves it after that step and ends it in all processes, with
    :class:`~dfd.engine.stop.Stopped`.

    The last hook of a step: what is in a checkpoint has been evaluated and logged, so that a run
    that goes on from it does neither again. In every process, since each has a state of its own.
    """

    def __init__(
        self,
        checkpointer: StudentCheckpointer,
        period: int,
        max_to_keep: int | None = None,
        *,
        stop: StopRequest | None = None,
    ) -> None:
        self._checkpointer = checkpointer
        self._period = period
        self._max_to_keep = max_to_keep
        self._stop = stop or StopRequest()

    def before_train(self) -> None:
        start, end = self.trainer.start_iter, self.trainer.max_iter
        if start < end:
            self._stop.begin_steps()
        elif os.path.basename(self._checkpointer.get_checkpoint_file()) != FINAL:
            # The run was stopped here, and is resumed with this for its length.
            self._checkpointer.save("model_final", iteration=start - 1)

    def after_step(self) -> None:
        iteration = self.trainer.iter
        last = iteration + 1 == self.trainer.max_iter
        asked = self._stop.anywhere()
        if (iteration + 1) % self._period == 0 or (asked and not last):
            self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            self._checkpointer.keep_last(self._max_to_keep)
        if last:
            self._checkpointer.save("model_final", iteration=iteration)
        if asked:
            logger.warning(
                "%s: the run ends after %d of %d iterations, which are saved; --resume continues",
                signal.Signals(asked).name,
                iteration + 1,
                self.trainer.max_iter,
            )
            comm.synchronize()  # The first process writes: no other may be the first to end.
            raise Stopped(asked)
        if last:
            self._stop.end_steps()


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
    """Writes what a table about the run needs when it has ended, as the last thing it does.

    Time and memory are those of this process: after a resume, of the last part of the run.
    """

    def __init__(self, path: str, facts: Callable[[], dict[str, Any]]) -> None:
        """
        Args:
            path: of the file.
            facts: called at the end; its dict is the summary, with time and memory added.
        """
        self._path = path
        self._facts = facts

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:
            return  # The run failed.
        summary = {
            "iterations": self.trainer.max_iter,
            "seconds_per_iteration": self._median("time"),
            "peak_memory_mib": round(peak_memory_mib()),
            **self._facts(),
        }
        with whole_file(self._path) as f:
            json.dump(summary, f, indent=2)

    def _median(self, name: str) -> float | None:
        history = self.trainer.storage.histories().get(name)
        return None if history is None else history.median(10**6)

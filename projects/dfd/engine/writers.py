"""What a run logs, so that a resumed one logs what it would have logged."""

from __future__ import annotations

import json
import os
from typing import Any

from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
)

METRICS = "metrics.json"
# In iterations, as Detectron2's writers have it.
_SMOOTHING_WINDOW = 20
# Measured by the process, and not before some iterations: not the run's.
_OF_THE_PROCESS = ("time",)


class _Printer(CommonMetricPrinter):
    """Detectron2's, which divides by zero where a run is stopped in one of its first iterations."""

    def _get_eta(self, storage: EventStorage) -> str | None:
        try:
            return super()._get_eta(storage)
        except ZeroDivisionError:  # It has written this iteration already.
            return None


def recent_scalars(storage: EventStorage) -> dict[str, Any]:
    """What the writers may still look back on: the last values of each scalar, with iterations."""
    hints = storage.smoothing_hints()
    scalars = {}
    for name, history in storage.histories().items():
        if name in _OF_THE_PROCESS:
            continue
        # With accumulation, an iteration has several values.
        count = storage.count_samples(name, _SMOOTHING_WINDOW) if hints[name] else 1
        scalars[name] = {"smoothed": hints[name], "values": list(history.values()[-count:])}
    return scalars


def restore_scalars(storage: EventStorage, scalars: dict[str, Any]) -> None:
    """Put ``recent_scalars`` into a new storage."""
    for name, scalar in scalars.items():
        for value, iteration in scalar["values"]:
            storage.put_scalar(
                name, value, smoothing_hint=scalar["smoothed"], cur_iter=int(iteration)
            )


def metrics_size(output_dir: str) -> int:
    """Bytes that a run has written to its metrics.json so far."""
    path = os.path.join(output_dir, METRICS)
    return os.path.getsize(path) if os.path.isfile(path) else 0


def cut_metrics(output_dir: str, size: int) -> None:
    """Take from metrics.json what a resumed run will write again: all after so many bytes.

    Not by iteration: a run that is interrupted still writes what it has, part of which is from
    iterations before its last checkpoint.
    """
    if metrics_size(output_dir) > size:
        os.truncate(os.path.join(output_dir, METRICS), size)


def read_metrics(path: str) -> list[dict[str, Any]]:
    """The lines of a metrics.json, without one in the middle of which the run was killed."""
    lines = []
    with open(path, encoding="utf-8") as f:
        for line in f:
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    return lines


class ContinuedJSONWriter(JSONWriter):
    """Detectron2's, which knows what the file holds already and does not write it again."""

    def __init__(self, json_file: str, start: int | None = None) -> None:
        """
        Args:
            start: the first iteration that is written. The file may have a line of it: the
                evaluation after the last step of a run that is made longer.
        """
        lines = read_metrics(json_file) if os.path.isfile(json_file) else []
        super().__init__(json_file, window_size=_SMOOTHING_WINDOW)
        last = max((line["iteration"] for line in lines), default=-1)
        self._last_write = last if start is None else min(last, start - 1)


class ContinuedTensorboardWriter(TensorboardXWriter):
    """Detectron2's, which has TensorBoard drop what a killed run wrote after its checkpoint."""

    def __init__(self, log_dir: str, start: int) -> None:
        """
        Args:
            start: the first iteration that is written; 0 for a new run.
        """
        super().__init__(log_dir, _SMOOTHING_WINDOW, purge_step=start)
        self._last_write = start - 1


def build_writers(output_dir: str, max_iter: int, start: int = 0) -> list[EventWriter]:
    """Detectron2's default writers: the log, metrics.json, TensorBoard.

    Args:
        start: the iteration from which a resumed run goes on.
    """
    return [
        _Printer(max_iter),
        ContinuedJSONWriter(os.path.join(output_dir, METRICS), start),
        ContinuedTensorboardWriter(output_dir, start),
    ]

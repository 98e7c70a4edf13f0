"""Runs that have ended: whether anything is left to do, and what a longer one has to know."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

from omegaconf import DictConfig

from ..errors import UserError
from .build import Run
from .hooks.build import FOLLOWED, SUMMARY
from .state.checkpoint import StudentCheckpointer

# What results are of.
_TESTED = ("dataloader.test.", "dataloader.evaluator.")


def has_ended(cfg: DictConfig, run: Run, output_dir: str) -> bool:
    """Whether a run has made all its iterations, or was stopped early, and said so.

    Args:
        output_dir: of the run.

    Raises:
        UserError: it has made more than it is asked for, or ended under other test data, whose
            results are not those that are asked for.
    """
    if run.start > cfg.train.max_iter:
        raise UserError(
            f"--resume: the run in {output_dir} has made {run.start} iterations, more than "
            f"train.max_iter={cfg.train.max_iter}: set it to at least that"
        )
    at_end = run.start >= cfg.train.max_iter or has_stopped(cfg, run)
    if not (at_end and os.path.exists(os.path.join(output_dir, SUMMARY))):
        return False
    changes = [text for text in run.checkpointer.changes if text.startswith(_TESTED)]
    if changes:
        raise UserError(
            f"--resume: the run in {output_dir} has ended, and {changes[0]}: its results are of "
            "what it was tested on then; for others evaluate its model_final.pth with --eval-only"
        )
    return True


def has_stopped(cfg: DictConfig, run: Run) -> bool:
    """Whether the state of a run is one at which ``train.early_stop`` ends it.

    It goes on if it is now asked for more patience.
    """
    early_stop = run.checkpointer.checkpointables.get("early_stop")
    return early_stop is not None and early_stop.waited >= cfg.train.early_stop.patience


def recall_end(
    cfg: DictConfig, checkpointer: StudentCheckpointer, iterations: int
) -> dict[str, Any]:
    """Let a run that is made longer know what was evaluated after its last step.

    Its last checkpoint was written before that evaluation, and a run that was killed in between
    makes it again. Read before the summary is removed, in every process.

    Args:
        iterations: of the checkpoint that was resumed.

    Returns:
        What takes the place of the same in the state of the checkpoint.
    """
    summary: Any = None
    with contextlib.suppress(OSError, ValueError):
        with open(os.path.join(cfg.train.output_dir, SUMMARY), encoding="utf-8") as f:
            summary = json.load(f)
    if not isinstance(summary, dict) or summary.get("iterations") != iterations:
        return {}
    for name in FOLLOWED:
        if name in checkpointer.checkpointables and summary.get(name):
            checkpointer.checkpointables[name].load_state_dict(summary[name])
    size = summary.get("metrics_size")
    return {} if size is None else {"metrics_size": size}

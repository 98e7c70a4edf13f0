"""Whether a resumed run has anything left to do."""

from __future__ import annotations

import os

from omegaconf import DictConfig

from ..errors import UserError
from .build import Run
from .hooks.build import SUMMARY

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

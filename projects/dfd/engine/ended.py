"""Runs that have ended: whether anything is left to do, and what a longer one has to know."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

from omegaconf import DictConfig

from ..data.registered import content_of, registered_name
from ..errors import UserError
from .build import Run
from .hooks.build import FOLLOWED
from .run_folder import SUMMARY, read_summary
from .state.checkpoint import StudentCheckpointer
from .state.run_settings import TEST_DATA

logger = logging.getLogger("dfd")

# The summary of a run that was made longer since, beside the one to come.
_EARLIER = ".summary_before.json"
# What results are of.
_TESTED = ("dataloader.test.", "dataloader.evaluator.")
# Of it, what makes them another measure wherever the files are.
_MEASURED = (TEST_DATA, "dataloader.test.mapper.")


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
    end = read_summary(os.path.join(output_dir, SUMMARY))
    if not (at_end and "results" in end):
        return False
    changes = [text for text in run.checkpointer.changes if text.startswith(_TESTED)]
    if changes:
        raise UserError(
            f"--resume: the run in {output_dir} has ended, and {changes[0]}: its results are of "
            "what it was tested on then; for others evaluate its model_final.pth with --eval-only"
        )
    then = end.get("test_data")
    if then is not None and then != content_of(registered_name(cfg.dataloader.test.dataset)).sha256:
        raise UserError(
            f"--resume: the run in {output_dir} has ended, and the labels of its test data were "
            "changed since: for its results on them evaluate its model_final.pth with --eval-only"
        )
    return True


def has_stopped(cfg: DictConfig, run: Run) -> bool:
    """Whether the state of a run is one at which ``train.early_stop`` ends it.

    It goes on if it is now asked for more patience.
    """
    early_stop = run.checkpointer.checkpointables.get("early_stop")
    return early_stop is not None and early_stop.waited >= cfg.train.early_stop.patience


def forget_other_tests(run: Run) -> None:
    """Let a resumed run know nothing of what was measured on other test data than today's."""
    checkpointer = run.checkpointer
    changes = [text for text in checkpointer.changes if text.startswith(_MEASURED)]
    if not changes:
        return
    checkpointer.teacher_results = None
    followed = [checkpointer.checkpointables.get(name) for name in FOLLOWED]
    for best in filter(None, followed):
        if best.value is not None:
            logger.warning(
                "--resume: the best %s until now, %.5g, was measured otherwise (%s): it begins "
                "anew, and model_best.pth will be another",
                best.metric,
                best.value,
                changes[0],
            )
        best.clear()


def set_end_aside(output_dir: str, *, goes_on: bool) -> None:
    """Take away the summary of a run that has not ended any more; kept for :func:`recall_end`.

    Args:
        goes_on: whether the run does, or begins anew.
    """
    earlier = os.path.join(output_dir, _EARLIER)
    with contextlib.suppress(FileNotFoundError):
        if goes_on:
            os.replace(os.path.join(output_dir, SUMMARY), earlier)
        else:
            os.remove(earlier)


def recall_end(
    cfg: DictConfig, checkpointer: StudentCheckpointer, iterations: int
) -> dict[str, Any]:
    """Let a run that is made longer know what was evaluated after its last step.

    Its last checkpoint was written before that evaluation, and a run that was killed in between
    makes it again. To be called in every process before the summary is set aside.

    Args:
        iterations: of the checkpoint that was resumed.

    Returns:
        What takes the place of the same in the state of the checkpoint.
    """
    if iterations >= cfg.train.max_iter:
        return {}
    for name in (SUMMARY, _EARLIER):
        end = read_summary(os.path.join(cfg.train.output_dir, name))
        if end.get("iterations") == iterations and "metrics_size" in end:
            break
    else:
        return {}
    for name in FOLLOWED:
        if name in checkpointer.checkpointables and end.get(name):
            checkpointer.checkpointables[name].load_state_dict(end[name])
    return {"metrics_size": end["metrics_size"]}

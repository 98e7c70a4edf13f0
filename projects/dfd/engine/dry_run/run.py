"""``--dry-run``: all that a start does but train, and a table of what would be trained."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
from collections.abc import Callable

from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from ...distill.detector import DistilledDetector
from ...errors import UserError
from ..build import Run, student_of
from ..checks import check_output_dir
from ..config.make import make
from ..config.resolve import pin_defaults
from ..config.saved import save_config
from ..console import say
from ..ended import forget_other_tests, has_ended
from ..evaluation import teacher_results
from ..hooks.build import build_hooks
from .measure import measure_steps
from .table import table


def dry_run(cfg: DictConfig, prepare: Callable[..., Run], *, resume: bool, scratch: str) -> None:
    """Build and check all of a run, train a few steps and print a table.

    Nothing is written into ``train.output_dir``, which is only read, for ``resume``.

    Args:
        cfg: resolved; its output folder is another afterwards.
        prepare: builds and loads the run.
        scratch: a folder that will be removed, see ``leaving_nothing``.

    Raises:
        UserError: the run could not start, or would not train as configured.
    """
    output_dir = cfg.train.output_dir
    main = comm.is_main_process()
    if main:
        say(f"Dry run: nothing is written to {output_dir}")
    # pycocotools prints as it goes.
    with contextlib.redirect_stdout(io.StringIO()):
        run = prepare(cfg, resume=resume, writes=False)
        cfg.train.output_dir = scratch  # Whatever in the config refers to it follows.
        text = _examine(cfg, run, output_dir)
    if main:
        say(text)
        if not resume:
            try:
                check_output_dir(output_dir)
            except UserError as error:
                raise UserError(f"a start would be refused: {error}") from error


def _examine(cfg: DictConfig, run: Run, output_dir: str) -> str:
    if has_ended(cfg, run, output_dir):
        return f"Nothing to do: {output_dir} has ended after {run.start} iterations"
    forget_other_tests(run)
    run.checkpointer.teacher_results = teacher_results(
        cfg, run.model, run.checkpointer.teacher_results
    )
    if comm.is_main_process():
        save_config(pin_defaults(cfg), os.path.join(cfg.train.output_dir, "config.yaml"))
    build_hooks(cfg, run, {}, writers=False)
    measured = measure_steps(run, cfg.train.device)
    check_gradients(run.model, run.start, measured.without_gradient)
    evaluated = _evaluate_a_batch(cfg, student_of(run.model))
    return table(cfg, run, measured, evaluated)


def check_gradients(model: nn.Module, iteration: int, without: list[str]) -> None:
    """
    Raises:
        UserError: a parameter of the head gets no gradient from its loss, so it would stay what it
            was drawn as.
    """
    if not isinstance(model, DistilledDetector) or model.head.factor(iteration) == 0:
        return
    wrong = [name for name in without if name.startswith("head.")]
    if wrong:
        raise UserError(
            f"no gradient reaches {len(wrong)} trainable parameters of the distillation head "
            f"({', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}): the criterion does not "
            "depend on them; correct model.head.criterion or model.head.adapter"
        )


def _evaluate_a_batch(cfg: DictConfig, student: nn.Module) -> int:
    """Run the student and the evaluator on one test batch; the number of its images."""
    batches = list(itertools.islice(make(cfg.dataloader.test, "dataloader.test"), 1))
    evaluator = None
    if "evaluator" in cfg.dataloader:
        evaluator = make(cfg.dataloader.evaluator, "dataloader.evaluator")
    inference_on_dataset(student, batches, evaluator)
    return sum(map(len, batches))

"""Training and evaluation, as ``train_net.py`` and the Python API run them."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from ..data import class_names, registered_name, skip_batches
from ..distill.detector import DistilledDetector
from ..errors import UserError, first_line
from ..modeling.timm_weights import pretrained_files
from ..weights.files import file_sha256
from ..weights.strict import local_path
from .build import (
    Run,
    build_checkpointer,
    build_loader,
    build_model,
    build_optimizer,
    build_trainer,
    student_of,
)
from .checks import (
    check_inherited_classes,
    check_output_dir,
    check_same_start,
    frozen_at_random,
)
from .config.resolve import pin_defaults, resolve_config, skip_pretrained
from .config.saved import read_names, save_config
from .config.schema import add_defaults, check_settings, check_training
from .dry_run.run import dry_run
from .dry_run.sandbox import leaving_nothing
from .ended import forget_other_tests, has_ended, has_stopped, recall_end, set_end_aside
from .evaluation import evaluate_checkpoint, evaluate_teacher, teacher_results
from .hooks.build import build_hooks
from .machine import forget_peak_memory
from .run_folder import SUMMARY, read_summary
from .state.checkpoint import StudentCheckpointer
from .state.files import sole_writer
from .state.random_state import restore_random_state
from .stop import StopRequest
from .writers import cut_metrics

logger = logging.getLogger("dfd")

CONFIG = "config.yaml"


def train(
    cfg: DictConfig, *, resume: bool = False, stop: StopRequest | None = None
) -> dict[str, Any]:
    """Train the model of a config, as ``train_net.py`` does in one process.

    Everything is checked first, then a log, the config, metrics and checkpoints are written to
    ``train.output_dir``. A signal that asks this process to stop ends the run after its step, which
    is saved.

    Args:
        cfg: of :func:`load_config`; it stays as it is.
        resume: whether to go on with the run in ``train.output_dir``, if there is one.
        stop: what is told of signals already; None: they are listened for here.

    Returns:
        The results of the last evaluation, by task and metric; empty but in the main process.

    Raises:
        UserError: something in the config, its files or its data is wrong, or training diverged.
        Stopped: a signal asked for the end.
    """
    with contextlib.ExitStack() as listening, reference_errors():
        if stop is None:
            stop = StopRequest()
            listening.enter_context(stop.listening())
        cfg = checked(cfg, trains=True)
        # The other processes do not look: the main one may have begun to write by then.
        if comm.is_main_process() and not resume:
            check_output_dir(cfg.train.output_dir)
        if cfg.train.seed < 0:
            cfg.train.seed = draw_seed(cfg.train.output_dir, resume)
        with contextlib.ExitStack() as own:
            if comm.is_main_process():
                own.enter_context(sole_run(cfg.train.output_dir))
            own.enter_context(log_to_folder(cfg.train.output_dir))
            setup(cfg)
            return run_training(resolve_config(cfg), resume=resume, stop=stop)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate the weights of ``train.init_checkpoint`` as the student, as ``--eval-only`` does.

    Args:
        cfg: of :func:`load_config`; it stays as it is.

    Returns:
        The results, by task and metric; empty but in the main process.

    Raises:
        UserError: the weights do not fit, or something in the config or its data is wrong.
    """
    with reference_errors():
        cfg = checked(cfg, trains=False)
        with log_to_folder(cfg.train.output_dir):
            setup(cfg)
            return evaluate_checkpoint(resolve_config(cfg))


def measure_teacher(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate the teacher of a config, as ``--eval-teacher`` does; like :func:`evaluate`."""
    with reference_errors():
        cfg = checked(cfg, trains=False)
        with log_to_folder(cfg.train.output_dir):
            setup(cfg)
            resolve_config(cfg)
            skip_pretrained(cfg.model.get("student", cfg.model))
            return evaluate_teacher(cfg, build_model(cfg))


def rehearse(cfg: DictConfig, *, resume: bool = False) -> None:
    """Check all that :func:`train` needs and print a table, as ``--dry-run`` does."""
    with reference_errors():
        cfg = checked(cfg, trains=True)
        setup(cfg)
        with leaving_nothing(cfg) as scratch:
            dry_run(resolve_config(cfg), prepare, resume=resume, scratch=scratch)


@contextlib.contextmanager
def reference_errors() -> Iterator[None]:
    """Within the context, a config that refers to what is not there is a UserError."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise UserError(f"the config refers to what is not there: {first_line(error)}") from error


def checked(cfg: DictConfig, *, trains: bool) -> DictConfig:
    """A copy of a config, whose settings are such as a run can have."""
    cfg = copy.deepcopy(cfg)
    add_defaults(cfg)
    check_settings(cfg)
    if trains:
        check_training(cfg)
    return cfg


@contextlib.contextmanager
def sole_run(output_dir: str) -> Iterator[None]:
    """Keep the folder of a run for this process, and make it where there is none.

    Raises:
        UserError: another training has it, or it cannot be written to.
    """
    with contextlib.ExitStack() as kept:
        with writable(output_dir):
            PathManager.mkdirs(output_dir)
            kept.enter_context(sole_writer(output_dir))
        yield


@contextlib.contextmanager
def writable(output_dir: str) -> Iterator[None]:
    """Within the context, what the system refuses is told of the run's folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"train.output_dir {output_dir} cannot be written to ({error.strerror}): choose another"
        ) from error


@contextlib.contextmanager
def log_to_folder(output_dir: str) -> Iterator[None]:
    """Logging, as Detectron2's ``default_setup``, for the time of one run."""
    names = ("fvcore", "detectron2", "dfd")
    before = {name: list(logging.getLogger(name).handlers) for name in names}
    setup_logger.cache_clear()  # It gives nothing to a logger that it has been called for.
    try:
        with writable(output_dir):
            if comm.is_main_process():
                PathManager.mkdirs(output_dir)
            for name in names:
                setup_logger(output_dir, distributed_rank=comm.get_rank(), name=name)
        logger.info("Environment:\n%s", collect_env_info())
        logger.info("Command line: %s", shlex.join(sys.argv))
        yield
    finally:
        # The next run of this process writes to a log of its own.
        for name, handlers in before.items():
            logging.getLogger(name).handlers = handlers


def setup(cfg: DictConfig) -> None:
    """Seeds and cuDNN's benchmark, as Detectron2's ``default_setup``."""
    # The same in all processes until training starts: what is built must be the same in all.
    seed_all_rng(comm.shared_random_seed() if cfg.train.seed < 0 else cfg.train.seed)
    torch.backends.cudnn.benchmark = bool(cfg.train.get("cudnn_benchmark", False))


def draw_seed(output_dir: str, resume: bool) -> int:
    """A seed for a run that names none, the same in all processes; a resumed run has its own."""
    path = os.path.join(output_dir, CONFIG)
    if not (resume and os.path.isfile(path)):
        return int(comm.shared_random_seed())
    try:
        return int(read_names(path)["train"]["seed"])
    except Exception as error:
        raise UserError(
            f"--resume: {path} cannot be read for the seed that the run drew "
            f"({first_line(error)}): set train.seed to it"
        ) from error


def prepare(cfg: DictConfig, *, resume: bool = False, writes: bool = True) -> Run:
    """Build and load all that the training of a config needs; nothing is written.

    Args:
        writes: whether the run may write later, and remove what a killed one left half written.
    """
    model = build_model(_resumed(cfg) if resume else cfg)
    student = student_of(model)
    logger.info("Student:\n%s", student)
    optimizer = build_optimizer(cfg, model)
    loader, num_images = build_loader(cfg)
    trainer = build_trainer(cfg, model, loader, optimizer)
    checkpointer = build_checkpointer(cfg, model, trainer)
    checkpointer.save_to_disk = checkpointer.save_to_disk and writes
    state = load_weights(cfg, model, checkpointer, resume)
    return Run(model, optimizer, loader, num_images, trainer, checkpointer, state)


def _resumed(cfg: DictConfig) -> DictConfig:
    """The config from which a student is built whose weights the run's last checkpoint holds."""
    if not os.path.isfile(os.path.join(cfg.train.output_dir, "last_checkpoint")):
        return cfg
    cfg = copy.deepcopy(cfg)  # What the run keeps of its config stays.
    skip_pretrained(cfg.model.get("student", cfg.model))  # The teacher is in no checkpoint.
    return cfg


def run_training(cfg: DictConfig, *, resume: bool, stop: StopRequest) -> dict[str, Any]:
    """Train the model of a resolved config; returns the last evaluation's results.

    Raises:
        Stopped: it was asked for by ``stop``; what had been done is saved.
    """
    run = prepare(cfg, resume=resume)
    trainer, checkpointer, start = run.trainer, run.checkpointer, run.start
    check_same_start(run.model, start)
    if has_ended(cfg, run, cfg.train.output_dir):
        logger.info("Nothing to do: %s has ended after %d iterations", cfg.train.output_dir, start)
        summary = read_summary(os.path.join(cfg.train.output_dir, SUMMARY))
        return summary["results"] if comm.is_main_process() else {}
    forget_other_tests(run)
    checkpointer.teacher_results = teacher_results(cfg, run.model, checkpointer.teacher_results)
    forget_peak_memory()  # An evaluation of the teacher is no part of what training takes.
    if comm.is_main_process():
        begin_files(cfg, run, resume=resume)
    results: dict[str, Any] = {}
    trainer.register_hooks(build_hooks(cfg, run, results, stop=stop))
    # Building a teacher and a head draws random numbers, and so does evaluating a teacher; a run
    # without them must see the same stream in training, or runs of one seed would differ by more
    # than what was changed. Each process draws from a stream of its own.
    seed_all_rng(cfg.train.seed + comm.get_rank())
    if run.state is not None:
        batches = start * trainer.accumulation_steps
        continue_streams(run.loader, batches, run.state["random_states"])
    trainer.train(start, start if has_stopped(cfg, run) else cfg.train.max_iter)
    return results


def begin_files(cfg: DictConfig, run: Run, *, resume: bool) -> None:
    """Write the config; take back what a resumed run has written after its last checkpoint."""
    write_config(cfg)
    if resume:
        cut_metrics(cfg.train.output_dir, 0 if run.state is None else run.state["metrics_size"])
    set_end_aside(cfg.train.output_dir, goes_on=run.state is not None)


def write_config(cfg: DictConfig) -> None:
    """Write what the run is, with everything that its config leaves to defaults."""
    path = os.path.join(cfg.train.output_dir, CONFIG)
    partial = os.path.join(cfg.train.output_dir, f".{CONFIG}.partial")
    save_config(pin_defaults(cfg), partial)
    # Detectron2 pickles what cannot be written as text. A reader finds either whole.
    for suffix in ("", ".pkl"):
        if os.path.exists(partial + suffix):
            os.replace(partial + suffix, path + suffix)


def load_weights(
    cfg: DictConfig, model: nn.Module, checkpointer: StudentCheckpointer, resume: bool
) -> dict[str, Any] | None:
    """The weights to start from: a resumed run's, or the initial ones and then the inherited.

    Returns:
        What else the checkpoint of a resumed run holds; None if none was resumed.
    """
    state = checkpointer.resume() if resume else None
    if state is not None:
        state = state | recall_end(cfg, checkpointer, state["iteration"] + 1)
        checkpointer.recall_best()
        return state
    if resume:
        logger.warning(
            "--resume: %s holds no checkpoint; starting from the beginning", cfg.train.output_dir
        )
    if cfg.train.init_checkpoint:
        # Detectron2 takes options of loading behind a question mark.
        path = os.path.expanduser(cfg.train.init_checkpoint)
        file = local_path(path.partition("?")[0], "train.init_checkpoint")
        checkpointer.load(path, checkpointables=[])
        checkpointer.start = {"path": cfg.train.init_checkpoint, "sha256": file_sha256(file)}
    else:
        checkpointer.pretrained = pretrained_files(student_of(model))
    report = None
    if isinstance(model, DistilledDetector):
        report = model.inherit_from_teacher()
        classes = class_names(registered_name(cfg.dataloader.train.dataset))
        check_inherited_classes(report, model.teacher, classes)
        if report is not None:
            logger.info("%s", report)
    node = cfg.model.get("student", cfg.model)
    inherited = [] if report is None else report.inherited
    constant = frozen_at_random(student_of(model), node, inherited)
    if constant and not cfg.train.init_checkpoint:
        logger.warning(
            "The student starts from random weights (train.init_checkpoint is empty), and %s of it "
            "are frozen: name weights, or set freeze_at=0 and another norm than FrozenBN",
            constant,
        )
    return None


def continue_streams(loader: Any, batches: int, random_states: list[dict[str, Any]]) -> None:
    """Put the data and every random generator where a checkpoint left them."""
    if not skip_batches(loader, batches):
        logger.warning("--resume: the training loader is not this project's: its data start anew")
    if len(random_states) == comm.get_world_size():
        restore_random_state(random_states[comm.get_rank()])
    else:
        logger.warning(
            "--resume: %d processes instead of %d: the run goes on, but not as it would have",
            comm.get_world_size(),
            len(random_states),
        )

"""Training and evaluation as ``train_net.py`` runs them."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from typing import Any

import torch
from detectron2.config import LazyConfig
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from ..data import skip_batches
from ..distiller import DistilledDetector
from ..errors import UserError, first_line
from ..weights import local_path
from .build import (
    SUMMARY,
    build_checkpointer,
    build_hooks,
    build_model,
    build_optimizer,
    build_trainer,
    count_images,
    micro_batches,
    student_of,
)
from .checkpoint import StudentCheckpointer, restore_random_state
from .checks import check_output_dir
from .config import load_config, pin_defaults, resolve_config, set_length
from .evaluate import evaluate_checkpoint
from .metrics import cut_metrics
from .settings import check_settings, make

logger = logging.getLogger("dfd")

_GRACE_SECONDS = 5
_ERROR_NAME = f"{UserError.__module__}.{UserError.__qualname__}"


def main(args: argparse.Namespace) -> None:
    """One process of a run. A :class:`UserError` becomes one line and exit code 1."""
    try:
        cfg = load_config(args.config_file, args.opts)
        check_settings(cfg)
        # Not in the other processes: by then the main one may have begun to write.
        if comm.is_main_process() and not args.eval_only and not args.resume:
            check_output_dir(cfg.train.output_dir)
        setup(cfg, args)
        resolve_config(cfg)
        if args.eval_only:
            evaluate_checkpoint(cfg)
        else:
            train(cfg, resume=args.resume)
    except (UserError, OmegaConfBaseException) as error:
        # A loader's worker process wraps its error's message in its traceback; ours comes last.
        message = str(error).strip().splitlines()[-1].removeprefix(f"{_ERROR_NAME}: ")
        if not isinstance(error, UserError):
            message = f"the config refers to what is not there: {first_line(error)}"
        if comm.is_main_process():
            print(f"error: {message}", file=sys.stderr)
        else:
            # If the main process has met the same, it says so and ends all of them before this.
            time.sleep(_GRACE_SECONDS)
            print(f"error: process {comm.get_rank()}: {message}", file=sys.stderr)
        sys.exit(1)


def setup(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Logging and seeds, as Detectron2's ``default_setup``."""
    output_dir, rank = cfg.train.output_dir, comm.get_rank()
    try:
        if comm.is_main_process():
            PathManager.mkdirs(output_dir)
        for name in ("fvcore", "detectron2", "dfd"):
            setup_logger(output_dir, distributed_rank=rank, name=name)
    except OSError as error:
        raise UserError(
            f"train.output_dir {output_dir} cannot be written to ({error.strerror}): choose another"
        ) from error
    logger.info("Environment:\n%s", collect_env_info())
    logger.info("Command line arguments: %s", args)
    set_seed(cfg)
    torch.backends.cudnn.benchmark = bool(cfg.train.get("cudnn_benchmark", False))


def set_seed(cfg: DictConfig) -> None:
    """Seed torch, numpy and random; each process draws from a stream of its own."""
    seed_all_rng(None if cfg.train.seed < 0 else cfg.train.seed + comm.get_rank())


def train(cfg: DictConfig, *, resume: bool = False) -> dict[str, Any]:
    """Train the model of a config; returns the last evaluation's results."""
    model = build_model(cfg)
    student = student_of(model)
    logger.info("Student:\n%s", student)
    optimizer = build_optimizer(cfg, model)
    loader = make(micro_batches(cfg), "dataloader.train")
    num_images = count_images(loader)
    set_length(cfg, num_images)
    trainer = build_trainer(cfg, model, loader, optimizer)
    checkpointer = build_checkpointer(cfg, model, trainer)
    state = load_weights(cfg, model, checkpointer, resume)
    start = 0 if state is None else state["iteration"] + 1
    output_dir = cfg.train.output_dir
    if start >= cfg.train.max_iter and os.path.exists(os.path.join(output_dir, SUMMARY)):
        logger.info("Nothing to do: %s has ended after %d iterations", output_dir, start)
        return {}
    if comm.is_main_process():
        LazyConfig.save(pin_defaults(cfg), os.path.join(output_dir, "config.yaml"))
        if resume:
            cut_metrics(os.path.join(output_dir, "metrics.json"), start - 1)
    results: dict[str, Any] = {}
    trainer.register_hooks(build_hooks(cfg, model, checkpointer, results, num_images))
    # Building a teacher and a head draws random numbers; a run without them must see the same
    # stream in training, or runs of one seed would differ by more than what was changed.
    set_seed(cfg)
    if state is not None:
        continue_streams(loader, start * trainer.accumulation_steps, state["random_states"])
    trainer.train(start, cfg.train.max_iter)
    return results


def load_weights(
    cfg: DictConfig, model: nn.Module, checkpointer: StudentCheckpointer, resume: bool
) -> dict[str, Any] | None:
    """The weights to start from: a resumed run's, or the initial ones and then the inherited.

    Returns:
        What else the checkpoint of a resumed run holds; None if none was resumed.
    """
    state = checkpointer.resume() if resume else None
    if state is not None:
        return state
    if resume:
        logger.warning(
            "--resume: %s holds no checkpoint; starting from the beginning", cfg.train.output_dir
        )
    if cfg.train.init_checkpoint:
        # Detectron2 takes options of loading behind a question mark.
        local_path(cfg.train.init_checkpoint.partition("?")[0], "train.init_checkpoint")
        checkpointer.load(cfg.train.init_checkpoint, checkpointables=[])
    if isinstance(model, DistilledDetector):
        report = model.inherit_from_teacher()
        if report is not None:
            logger.info("%s", report)
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

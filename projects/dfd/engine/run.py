"""Training and evaluation as ``train_net.py`` runs them."""

from __future__ import annotations

import argparse
import copy
import logging
import os
import sys
import time
from typing import Any

import detectron2
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import HookBase, create_ddp_model, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader

from ..data import class_names, registered_name, skip_batches
from ..detectors import guard_square_padding
from ..distiller import DistilledDetector
from ..errors import UserError
from ..weights import load_strict, local_path, read_weights
from .checkpoint import StudentCheckpointer, cut_metrics, restore_random_state
from .checks import (
    check_classes,
    check_image_format,
    check_mixed_precision,
    check_optimizer,
    check_output_dir,
)
from .config import load_config, pin_defaults, resolve_config, set_length
from .hooks import Checkpoints, DisparityImages, RunSummary
from .machine import processor_name
from .trainer import Trainer

logger = logging.getLogger("dfd")

SUMMARY = "summary.json"
_GRACE_SECONDS = 5
_ERROR_NAME = f"{UserError.__module__}.{UserError.__qualname__}"


def main(args: argparse.Namespace) -> None:
    """One process of a run. A :class:`UserError` becomes one line and exit code 1."""
    try:
        cfg = load_config(args.config_file, args.opts)
        # Not in the other processes: by then the main one may have begun to write.
        if comm.is_main_process() and not args.eval_only and not args.resume:
            check_output_dir(cfg.train.output_dir)
        setup(cfg, args)
        resolve_config(cfg)
        if args.eval_only:
            evaluate_checkpoint(cfg)
        else:
            train(cfg, resume=args.resume)
    except UserError as error:
        # A loader's worker process wraps its error's message in its traceback; ours comes last.
        message = str(error).strip().splitlines()[-1].removeprefix(f"{_ERROR_NAME}: ")
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
    if comm.is_main_process():
        PathManager.mkdirs(output_dir)
    for name in ("fvcore", "detectron2", "dfd"):
        setup_logger(output_dir, distributed_rank=rank, name=name)
    logger.info("Environment:\n%s", collect_env_info())
    logger.info("Command line arguments: %s", args)
    set_seed(cfg)
    torch.backends.cudnn.benchmark = bool(cfg.train.get("cudnn_benchmark", False))


def set_seed(cfg: DictConfig) -> None:
    """Seed torch, numpy and random; each process draws from a stream of its own."""
    seed_all_rng(None if cfg.train.seed < 0 else cfg.train.seed + comm.get_rank())


def student_of(model: nn.Module) -> nn.Module:
    """The bare detector, which a plain model is itself."""
    return model.student if isinstance(model, DistilledDetector) else model


def test(cfg: DictConfig, student: nn.Module) -> dict[str, Any]:
    """Evaluate a detector on the test data with the configured evaluator, if there is one."""
    if "evaluator" not in cfg.dataloader:
        return {}
    results = inference_on_dataset(
        student, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    )
    if comm.is_main_process():
        print_csv_format(results)
    return results


def evaluate_checkpoint(cfg: DictConfig) -> dict[str, Any]:
    """``--eval-only``: evaluate ``train.init_checkpoint``, which must fit the student exactly."""
    if not cfg.train.init_checkpoint:
        raise UserError(
            "--eval-only needs train.init_checkpoint=<checkpoint>: there are no weights to evaluate"
        )
    node = cfg.model.student if "student" in cfg.model else cfg.model
    student = instantiate(node).to(cfg.train.device)
    guard_square_padding(student, "student")
    weights = read_weights(cfg.train.init_checkpoint, "train.init_checkpoint")
    load_strict(student, weights, "train.init_checkpoint")
    if weights.class_names is not None:
        data_classes = class_names(registered_name(cfg.dataloader.test.dataset))
        if weights.class_names != data_classes:
            raise UserError(
                f"train.init_checkpoint was trained on {weights.class_names}, but the test data's "
                f"classes are {data_classes}"
            )
    return test(cfg, student)


def build_model(cfg: DictConfig) -> nn.Module:
    """The model of a config, on its device and checked against the data."""
    model = instantiate(cfg.model).to(cfg.train.device)
    guard_square_padding(student_of(model), "student")
    if cfg.train.amp.enabled:
        check_mixed_precision(student_of(model))
    teacher = model.teacher if isinstance(model, DistilledDetector) else None
    check_image_format(model, cfg.dataloader)
    check_classes(
        student_of(model),
        teacher,
        class_names(registered_name(cfg.dataloader.train.dataset)),
        class_names(registered_name(cfg.dataloader.test.dataset)),
    )
    return model


def train(cfg: DictConfig, *, resume: bool = False) -> dict[str, Any]:
    """Train the model of a config; returns the last evaluation's results."""
    model = build_model(cfg)
    student = student_of(model)
    logger.info("Student:\n%s", student)
    optimizer = build_optimizer(cfg, model)
    loader = instantiate(micro_batches(cfg))
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


def build_checkpointer(cfg: DictConfig, model: nn.Module, trainer: Trainer) -> StudentCheckpointer:
    """What saves the student, and the trainer and head beside it."""
    distilled = isinstance(model, DistilledDetector)
    teacher = model.teacher.weights if distilled else None
    return StudentCheckpointer(
        student_of(model),
        cfg.train.output_dir,
        class_names=class_names(registered_name(cfg.dataloader.train.dataset)),
        teacher_sha256=teacher.sha256 if teacher else None,
        trainer=trainer,
        **({"head": model.head} if distilled else {}),
    )


def micro_batches(cfg: DictConfig) -> DictConfig:
    """The training loader's config, for the batches of which ``accumulation_steps`` make a step.

    ``total_batch_size`` is that of a step, so that accumulation saves memory and changes nothing
    else.
    """
    node, steps = cfg.dataloader.train, cfg.train.accumulation_steps
    if steps == 1 or "total_batch_size" not in node:
        return node
    if steps < 1 or node.total_batch_size % steps:
        raise UserError(
            f"train.accumulation_steps={steps} does not divide "
            f"dataloader.train.total_batch_size={node.total_batch_size}"
        )
    node = copy.deepcopy(node)
    node.total_batch_size //= steps
    return node


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


def build_optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The configured optimizer, which must hold every trainable parameter exactly once."""
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    # A model is no part of a config that is saved.
    del cfg.optimizer.params["model"]
    check_optimizer(model, optimizer)
    return optimizer


def build_trainer(
    cfg: DictConfig, model: nn.Module, loader: Any, optimizer: torch.optim.Optimizer
) -> Trainer:
    """The training loop around the model, in DistributedDataParallel if there are processes."""
    on_cpu = torch.device(cfg.train.device).type == "cpu"
    ddp = {"device_ids": None} if on_cpu else {}
    return Trainer(
        create_ddp_model(model, **cfg.train.ddp, **ddp),
        loader,
        optimizer,
        device=cfg.train.device,
        amp=cfg.train.amp.get("dtype", "bf16") if cfg.train.amp.enabled else None,
        accumulation_steps=cfg.train.accumulation_steps,
        clip_grad_norm=cfg.train.clip_grad_norm,
    )


def build_hooks(
    cfg: DictConfig,
    model: nn.Module,
    checkpointer: StudentCheckpointer,
    results: dict[str, Any],
    num_images: int | None,
) -> list[HookBase | None]:
    """Detectron2's hooks, and ours, in the order in which they must run.

    Args:
        results: filled with the results of each evaluation.
        num_images: of the training data, for the summary.
    """
    student = student_of(model)

    def evaluate() -> dict[str, Any]:
        results.clear()
        results.update(test(cfg, student))
        return results

    def facts() -> dict[str, Any]:
        teacher = model.teacher.weights if isinstance(model, DistilledDetector) else None
        return {
            "results": results,
            "parameters": sum(p.numel() for p in student.parameters()),
            "train_images": num_images,
            "seed": cfg.train.seed,
            "device": str(cfg.train.device),
            "processor": processor_name(cfg.train.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "detectron2": detectron2.__version__,
            "teacher": {"path": teacher.path, "sha256": teacher.sha256} if teacher else None,
        }

    everywhere = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
    ]
    evaluation = hooks.EvalHook(cfg.train.eval_period, evaluate)
    checkpoints = Checkpoints(checkpointer, **cfg.train.checkpointer)
    if not comm.is_main_process():
        return [*everywhere, evaluation, checkpoints]
    output_dir, max_iter = cfg.train.output_dir, cfg.train.max_iter
    return [
        *everywhere,
        disparity_images(cfg, model),
        evaluation,
        hooks.PeriodicWriter(default_writers(output_dir, max_iter), cfg.train.log_period),
        checkpoints,
        RunSummary(os.path.join(output_dir, SUMMARY), facts),
    ]


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


def count_images(loader: Any) -> int | None:
    """The number of training images behind a loader, None if it does not say."""
    while loader is not None:
        try:
            if not isinstance(loader, DataLoader):  # Whose length is in batches.
                return len(loader)
        except (TypeError, NotImplementedError):
            pass
        loader = getattr(loader, "dataset", None)
    return None


def disparity_images(cfg: DictConfig, model: nn.Module) -> DisparityImages | None:
    """The hook that draws the first few test images' disparity; None if there is none to draw."""
    settings = cfg.train.disparity_images
    if not isinstance(model, DistilledDetector) or not settings.period or not settings.num_images:
        return None
    batch: list[dict] = []
    for items in instantiate(cfg.dataloader.test):
        batch += [{"image": item["image"]} for item in items]
        if len(batch) >= settings.num_images:
            break
    return DisparityImages(
        model, batch[: settings.num_images], settings.period, cfg.train.output_dir
    )

"""What a run is made of: model, optimizer, loader, trainer, checkpointer and hooks of a config."""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import dataclass
from typing import Any

import detectron2
import torch
from detectron2.engine import HookBase, create_ddp_model, hooks
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from ..data import class_names, dataset_dicts, registered_name
from ..data.registered import has_objects
from ..detectors import guard_square_padding
from ..distiller import DistilledDetector
from ..errors import UserError
from ..processes import share_buffers
from .checkpoint import StudentCheckpointer
from .checks import check_classes, check_image_format, check_mixed_precision, check_optimizer
from .evaluate import test
from .hooks import (
    Best,
    BestCheckpoint,
    Checkpoints,
    DisparityImages,
    EarlyStop,
    Evaluation,
    RunSummary,
    StudentEMA,
    UpdateEMA,
    ValidationLoss,
)
from .hooks.settings import metric_period
from .kept_settings import run_settings
from .machine import processor_name
from .metrics import build_writers
from .settings import make
from .trainer import Trainer
from .wandb_writer import WandbWriter, plain_values

logger = logging.getLogger("dfd")

SUMMARY = "summary.json"


@dataclass
class Run:
    """All that a run is made of when it is about to start.

    Attributes:
        num_images: of the training data, None if the loader does not say.
        state: what a resumed checkpoint holds beside what was loaded; None if none was resumed.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Any
    num_images: int | None
    trainer: Trainer
    checkpointer: StudentCheckpointer
    state: dict[str, Any] | None

    @property
    def start(self) -> int:
        """The first iteration."""
        return 0 if self.state is None else self.state["iteration"] + 1


def student_of(model: nn.Module) -> nn.Module:
    """The bare detector, which a plain model is itself."""
    return model.student if isinstance(model, DistilledDetector) else model


def build_model(cfg: DictConfig) -> nn.Module:
    """The model of a config, on its device and checked against the data."""
    model = make(cfg.model, "model").to(cfg.train.device)
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


def build_optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The configured optimizer, which must hold every trainable parameter exactly once."""
    cfg.optimizer.params.model = model
    optimizer = make(cfg.optimizer, "optimizer")
    # A model is no part of a config that is saved.
    del cfg.optimizer.params["model"]
    check_optimizer(model, optimizer)
    return optimizer


def micro_batches(cfg: DictConfig) -> DictConfig:
    """The training loader's config, for the batches of which ``accumulation_steps`` make a step.

    ``total_batch_size`` is that of a step, so that accumulation saves memory and changes nothing
    else.
    """
    node, steps = cfg.dataloader.train, cfg.train.accumulation_steps
    if steps == 1 or "total_batch_size" not in node:
        return node
    if not isinstance(steps, int) or steps < 1 or node.total_batch_size % steps:
        raise UserError(
            f"train.accumulation_steps={steps} does not divide dataloader.train.total_batch_size="
            f"{node.total_batch_size}: it must be a whole number that does"
        )
    node = copy.deepcopy(node)
    node.total_batch_size //= steps
    return node


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


def build_trainer(
    cfg: DictConfig, model: nn.Module, loader: Any, optimizer: torch.optim.Optimizer
) -> Trainer:
    """The training loop around the model, in DistributedDataParallel if there are processes."""
    on_cuda = torch.device(cfg.train.device).type == "cuda"
    ddp = {"device_ids": [torch.cuda.current_device()] if on_cuda else None}
    return Trainer(
        create_ddp_model(model, **cfg.train.ddp, **ddp),
        loader,
        optimizer,
        device=cfg.train.device,
        amp=cfg.train.amp.get("dtype", "bf16") if cfg.train.amp.enabled else None,
        accumulation_steps=cfg.train.accumulation_steps,
        clip_grad_norm=cfg.train.clip_grad_norm,
    )


def build_checkpointer(cfg: DictConfig, model: nn.Module, trainer: Trainer) -> StudentCheckpointer:
    """What saves the student, and the trainer and head beside it."""
    loader = trainer.data_loader
    distilled = isinstance(model, DistilledDetector)
    teacher = model.teacher.weights if distilled else None
    return StudentCheckpointer(
        student_of(model),
        cfg.train.output_dir,
        class_names=class_names(registered_name(cfg.dataloader.train.dataset)),
        teacher_sha256=teacher.sha256 if teacher else None,
        settings=run_settings(cfg, loader, count_images(loader)),
        trainer=trainer,
        **({"head": model.head} if distilled else {}),
        **hook_states(cfg, student_of(model)),
    )


def hook_states(cfg: DictConfig, student: nn.Module) -> dict[str, Any]:
    """What the hooks that are asked for remember, by its key in a checkpoint and in ``train``."""
    best, early_stop, decay = cfg.train.best_checkpoint, cfg.train.early_stop, cfg.train.ema.decay
    states: dict[str, Any] = {}
    if decay is not None:
        states["ema"] = StudentEMA(student, decay)
    if best.metric is not None:
        states["best_checkpoint"] = Best(metric=best.metric, mode=best.mode)
    if early_stop.metric is not None:
        states["early_stop"] = Best(
            metric=early_stop.metric, mode=early_stop.mode, min_delta=early_stop.min_delta
        )
    return states


def build_hooks(
    cfg: DictConfig,
    model: nn.Module,
    checkpointer: StudentCheckpointer,
    results: dict[str, Any],
    num_images: int | None,
    start: int = 0,
) -> list[HookBase | None]:
    """Detectron2's hooks, and ours, in the order in which they must run.

    Args:
        results: filled with the results of each evaluation.
        num_images: of the training data, for the summary.
        start: the first iteration, later than 0 in a resumed run.
    """
    train, output_dir = cfg.train, cfg.train.output_dir
    # Last in a step: what is in a checkpoint has been evaluated and logged.
    everywhere = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=make(cfg.lr_multiplier, "lr_multiplier")),
        *evaluation_hooks(cfg, student_of(model), checkpointer, results),
    ]
    checkpoints = Checkpoints(checkpointer, **train.checkpointer)
    if not comm.is_main_process():
        return [*everywhere, checkpoints]

    def facts() -> dict[str, Any]:
        return run_facts(cfg, model, checkpointer, results, num_images)

    return [
        *everywhere,
        disparity_images(cfg, model),
        hooks.PeriodicWriter(
            [*build_writers(output_dir, train.max_iter, start), *wandb_writers(cfg)],
            train.log_period,
        ),
        checkpoints,
        RunSummary(os.path.join(output_dir, SUMMARY), facts),
    ]


def teacher_facts(model: nn.Module, results: dict[str, Any] | None) -> dict[str, Any] | None:
    """Where a run's teacher is from and, where it was measured, its AP; None if there is none.

    Box results stand at the top, those of another task under its name; path and hash of a teacher
    without weights are empty.
    """
    if not isinstance(model, DistilledDetector):
        return None
    weights, results = model.teacher.weights, dict(results or {})
    if weights is None and not results:
        return None
    return {
        "path": weights.path if weights else "",
        "sha256": weights.sha256 if weights else "",
        **results.pop("bbox", {}),
        **results,
    }


def evaluation_hooks(
    cfg: DictConfig,
    student: nn.Module,
    checkpointer: StudentCheckpointer,
    results: dict[str, Any],
) -> list[HookBase]:
    """The hooks that measure the student, and those that act on what they find.

    The EMA takes in a step before it is evaluated; an early stop comes before all that is done in
    the last step.
    """
    train, states = cfg.train, checkpointer.checkpointables
    ema = states.get("ema")

    def evaluate() -> dict[str, Any]:
        results.clear()
        share_buffers(student)
        results.update(test(cfg, student))
        if ema is not None:
            logger.info("Evaluation of the student's EMA")
            share_buffers(ema.model)
            results["ema"] = test(cfg, ema.model)
        return results

    found: list[HookBase] = []
    if ema is not None:
        found.append(UpdateEMA(ema, student, checkpointer))
    if train.val_loss.period:
        loader = make(labelled_test_loader(cfg), "dataloader.test")
        loss = ValidationLoss(student, loader, train.val_loss.num_images)
        found.append(Evaluation(train.val_loss.period, loss))
    found.append(Evaluation(train.eval_period, evaluate))
    if "best_checkpoint" in states and comm.is_main_process():
        best = states["best_checkpoint"]
        measured = ema.model if best.metric.startswith("ema/") else student
        period = metric_period(cfg, best.metric)
        found.append(BestCheckpoint(best, period, measured, checkpointer))
    if "early_stop" in states:
        best = states["early_stop"]
        period = metric_period(cfg, best.metric)
        found.append(EarlyStop(best, period, train.early_stop.patience))
    return found


def run_facts(
    cfg: DictConfig,
    model: nn.Module,
    checkpointer: StudentCheckpointer,
    results: dict[str, Any],
    num_images: int | None,
) -> dict[str, Any]:
    """What the summary says about a run that has ended, beside time and memory."""
    best = checkpointer.checkpointables.get("best_checkpoint")
    return {
        "results": results,
        "best_checkpoint": best.state_dict() if best is not None else None,
        "parameters": sum(p.numel() for p in student_of(model).parameters()),
        "train_images": num_images,
        "seed": cfg.train.seed,
        "device": str(cfg.train.device),
        "processor": processor_name(cfg.train.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
        "teacher": teacher_facts(model, checkpointer.teacher_results),
    }


def labelled_test_loader(cfg: DictConfig) -> DictConfig:
    """The test loader's config with labels: the training mapper under the test's augmentations."""
    name = registered_name(cfg.dataloader.test.dataset)
    if not any(has_objects(r) for r in dataset_dicts(dataset=name, filter_empty=False)):
        raise UserError(
            f"train.val_loss needs labelled test data, but no image of {name} has an object: set "
            "train.val_loss.period=0"
        )
    node, mapper = copy.deepcopy(cfg.dataloader.test), copy.deepcopy(cfg.dataloader.train.mapper)
    if "augmentations" not in mapper or "augmentations" not in node.get("mapper", {}):
        raise UserError(
            "train.val_loss needs mappers with augmentations, as Detectron2's DatasetMapper, in "
            "dataloader.train and dataloader.test: set train.val_loss.period=0"
        )
    mapper.augmentations = node.mapper.augmentations
    node.mapper = mapper
    return node


def wandb_writers(cfg: DictConfig) -> list[WandbWriter]:
    """The writer to Weights & Biases, if there is to be one."""
    settings = cfg.train.wandb
    if settings.project is None:
        return []
    config = plain_values(OmegaConf.to_container(cfg, resolve=True))
    return [WandbWriter(cfg.train.output_dir, config, **settings)]


def disparity_images(cfg: DictConfig, model: nn.Module) -> DisparityImages | None:
    """The hook that draws the first few test images' disparity; None if there is none to draw."""
    settings = cfg.train.disparity_images
    if not isinstance(model, DistilledDetector) or not settings.period or not settings.num_images:
        return None
    batch: list[dict] = []
    for items in make(cfg.dataloader.test, "dataloader.test"):
        batch += [{"image": item["image"]} for item in items]
        if len(batch) >= settings.num_images:
            break
    return DisparityImages(
        model, batch[: settings.num_images], settings.period, cfg.train.output_dir
    )

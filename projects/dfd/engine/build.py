"""What a run is made of: model, optimizer, loader, trainer, checkpointer and hooks of a config."""

from __future__ import annotations

import copy
import os
from typing import Any

import detectron2
import torch
from detectron2.engine import HookBase, create_ddp_model, hooks
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader

from ..data import class_names, registered_name
from ..detectors import guard_square_padding
from ..distiller import DistilledDetector
from ..errors import UserError
from .checkpoint import StudentCheckpointer
from .checks import check_classes, check_image_format, check_mixed_precision, check_optimizer
from .evaluate import test
from .hooks import Checkpoints, DisparityImages, RunSummary
from .machine import processor_name
from .metrics import build_writers
from .settings import make
from .trainer import Trainer

SUMMARY = "summary.json"


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
    if steps < 1 or node.total_batch_size % steps:
        raise UserError(
            f"train.accumulation_steps={steps} does not divide "
            f"dataloader.train.total_batch_size={node.total_batch_size}"
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
        hooks.LRScheduler(scheduler=make(cfg.lr_multiplier, "lr_multiplier")),
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
        hooks.PeriodicWriter(build_writers(output_dir, max_iter), cfg.train.log_period),
        checkpoints,
        RunSummary(os.path.join(output_dir, SUMMARY), facts),
    ]


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

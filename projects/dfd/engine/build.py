"""What a run is made of: model, optimizer, loader, trainer and checkpointer of a config."""

from __future__ import annotations

import copy
import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from ..data import class_names, registered_name
from ..data.registered import content_of, registered_names
from ..distill.contract import guard_square_padding
from ..distill.detector import DistilledDetector
from ..distill.processes import share_divisors
from ..errors import UserError
from .checks import (
    check_classes,
    check_evaluated_labels,
    check_image_format,
    check_labels,
    check_mixed_precision,
    check_optimizer,
    check_synchronised_norms,
    check_unlabelled,
    tell_other_form,
)
from .config.make import make
from .config.resolve import set_length
from .hooks import Best, StudentEMA
from .state.checkpoint import StudentCheckpointer
from .state.run_settings import TEST_DATA, TRAINING_DATA, run_settings
from .stop import guard_workers
from .trainer import Trainer

logger = logging.getLogger("dfd")


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
    _draw_student_first(cfg.model)
    model = make(cfg.model, "model").to(cfg.train.device)
    guard_square_padding(student_of(model), "student")
    if cfg.train.amp.enabled:
        check_mixed_precision(student_of(model))
    teacher = model.teacher if isinstance(model, DistilledDetector) else None
    check_unlabelled(model, cfg.dataloader)
    check_image_format(model, cfg.dataloader)
    check_classes(
        student_of(model),
        teacher,
        class_names(registered_name(cfg.dataloader.train.dataset)),
        class_names(registered_name(cfg.dataloader.test.dataset)),
    )
    if teacher is not None and teacher.weights is not None:
        tell_other_form(
            cfg.model.teacher.get("model"), teacher.weights, "model.teacher.checkpoint"
        )
    check_labels(student_of(model), cfg.dataloader)
    check_evaluated_labels(student_of(model), cfg.dataloader)
    return model


def _draw_student_first(node: DictConfig) -> None:
    """Put a model's student before its other parts, in place.

    They are made in this order, and each takes what random numbers it needs: a teacher written
    above its student would give that another start than a plain one of the same seed.
    """
    parts = node._content  # By the public interface a part would be copied, and lose its place.
    if "student" in parts:
        for key in [key for key in parts if key != "student"]:
            parts[key] = parts.pop(key)


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
    if node.total_batch_size % steps:
        raise UserError(
            f"train.accumulation_steps={steps} does not divide dataloader.train.total_batch_size="
            f"{node.total_batch_size}: it must be a whole number that does"
        )
    more = node.get("unlabelled_batch_size") or 0
    if more % steps:
        raise UserError(
            f"train.accumulation_steps={steps} does not divide dataloader.train."
            f"unlabelled_batch_size={more}: it must be a whole number that does"
        )
    node = copy.deepcopy(node)
    node.total_batch_size //= steps
    if more:
        node.unlabelled_batch_size //= steps
    return node


def build_loader(cfg: DictConfig) -> tuple[Any, int | None]:
    """The loader of training batches, and the number of its images; None if it does not say.

    Turns ``train.epochs``, if given, into ``train.max_iter``, in place.
    """

    def described() -> list[Any]:
        return [OmegaConf.to_container(x, resolve=True) for x in (micro_batches(cfg), cfg.model)]

    loader = make(micro_batches(cfg), "dataloader.train")
    num_images = count_images(loader)
    if cfg.train.epochs is not None:
        # Some of it may follow the run's length, which is not known before images are counted.
        data, model = described()
        set_length(cfg, num_images)
        now = described()
        if now[1] != model:
            raise UserError(
                "the model has settings that follow train.max_iter, and was made before the images "
                f"of train.epochs={cfg.train.epochs:g} were counted: set train.epochs=null "
                f"train.max_iter={cfg.train.max_iter}"
            )
        if now[0] != data:
            loader = make(micro_batches(cfg), "dataloader.train")
    return guard_workers(loader), num_images


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
    if isinstance(model, DistilledDetector):
        model.max_iter = cfg.train.max_iter
    on_cuda = torch.device(cfg.train.device).type == "cuda"
    check_synchronised_norms(model, on_cuda)
    share_divisors(student_of(model))
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
    # In one process: all records are read for it.
    known = data_hashes(cfg) if comm.is_main_process() else {}
    distilled = isinstance(model, DistilledDetector)
    teacher = model.teacher.weights if distilled else None
    return StudentCheckpointer(
        student_of(model),
        cfg.train.output_dir,
        class_names=class_names(registered_name(cfg.dataloader.train.dataset)),
        teacher_sha256=teacher.sha256 if teacher else None,
        settings=run_settings(
            cfg,
            loader,
            count_images(loader),
            count_images(getattr(loader, "unlabelled", None)),
            comm.all_gather(known)[0],
        ),
        input_format=getattr(model, "input_format", None),
        trainer=trainer,
        **({"head": model.head} if distilled else {}),
        **hook_states(cfg, student_of(model)),
    )


def data_hashes(cfg: DictConfig) -> dict[str, str]:
    """Hashes of the names and labels of training and test images; tells which are both."""
    nodes = [cfg.dataloader.train.dataset, cfg.dataloader.train.get("unlabelled")]
    names = [name for node in nodes if node for name in registered_names(node)]
    test = content_of(registered_name(cfg.dataloader.test.dataset))
    hashes, both = [], set()
    for name in dict.fromkeys(names):
        try:
            content = content_of(name)
        except UserError:
            if name == names[0]:
                raise
            continue  # Of several that Detectron2 joins: it reads them by its own rules.
        hashes.append(content.sha256)
        both |= test.files & content.files
    if both:
        logger.warning(
            "%d of the %d test images are training images too (%s, ...): the results say less "
            "about others",
            len(both),
            len(test.files),
            min(both),
        )
    together = hashlib.sha256(" ".join(hashes).encode()).hexdigest()
    return {TRAINING_DATA: together[:16], TEST_DATA: test.sha256[:16]}


def hook_states(cfg: DictConfig, student: nn.Module) -> dict[str, Any]:
    """What the hooks that are asked for remember, by its key in a checkpoint and in ``train``."""
    best, early_stop, ema = cfg.train.best_checkpoint, cfg.train.early_stop, cfg.train.ema
    states: dict[str, Any] = {}
    if ema.decay is not None:
        states["ema"] = StudentEMA(student, ema.decay, ema.warmup)
    if best.metric is not None:
        states["best_checkpoint"] = Best(metric=best.metric, mode=best.mode)
    if early_stop.metric is not None:
        states["early_stop"] = Best(
            metric=early_stop.metric, mode=early_stop.mode, min_delta=early_stop.min_delta
        )
    return states

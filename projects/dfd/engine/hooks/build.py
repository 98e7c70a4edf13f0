"""The hooks of a run, in the order in which they must run."""

from __future__ import annotations

import copy
import logging
import os
from typing import Any

import detectron2
import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ...data import registered_name
from ...data.registered import content_of, dataset_dicts, has_objects
from ...distill.detector import DistilledDetector
from ...errors import UserError
from ..build import Run, student_of
from ..checks import makes_boxes_only
from ..code_version import code_version
from ..config.make import make
from ..config.names import plain_values
from ..config.schema import metric_period
from ..evaluation import DETECTIONS, test
from ..machine import processor_name
from ..run_folder import SUMMARY
from ..state.checkpoint import StudentCheckpointer
from ..state.run_settings import TRAINING_DATA
from ..stop import StopRequest, guard_workers
from ..wandb_writer import WandbWriter
from ..writers import build_writers, metrics_size
from . import (
    BestCheckpoint,
    Checkpoints,
    DisparityImages,
    EarlyStop,
    Evaluation,
    RunSummary,
    UpdateEMA,
    ValidationLoss,
)
from .user import user_hooks

logger = logging.getLogger("dfd")
# The parts of a test item from which its picture is made.
_PICTURED = ("image", "teacher_image", "valid", "teacher_valid", "file_name")

# What follows a metric, by its key in a checkpoint and in the summary.
FOLLOWED = ("best_checkpoint", "early_stop")


def build_hooks(
    cfg: DictConfig,
    run: Run,
    results: dict[str, Any],
    *,
    stop: StopRequest | None = None,
    writers: bool = True,
) -> list[HookBase | None]:
    """Detectron2's hooks, ours and the user's, in the order in which they must run.

    What ours measure, the user's can read; what these measure is written.

    Args:
        results: filled with the results of each evaluation.
        stop: by which the run may be asked to end before its last iteration.
        writers: whether there are any of metrics, on this machine and elsewhere.
    """
    train, output_dir = cfg.train, cfg.train.output_dir
    # Last in a step: what is in a checkpoint has been evaluated and logged.
    everywhere = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=make(cfg.lr_multiplier, "lr_multiplier")),
        *evaluation_hooks(cfg, student_of(run.model), run.checkpointer, results),
        *user_hooks(cfg),
    ]
    checkpoints = Checkpoints(run.checkpointer, **train.checkpointer, stop=stop)
    if not comm.is_main_process():
        return [*everywhere, checkpoints]

    code_version()  # Kept from here on: the files may be changed while the run goes on.

    def facts() -> dict[str, Any]:
        return run_facts(cfg, run.model, run.checkpointer, results, run.num_images)

    written = []
    if writers:
        written = [*build_writers(output_dir, train.max_iter, run.start), *wandb_writers(cfg)]
    return [
        *everywhere,
        disparity_images(cfg, run.model),
        hooks.PeriodicWriter(written, train.log_period),
        checkpoints,
        RunSummary(os.path.join(output_dir, SUMMARY), facts),
    ]


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
    kept = os.path.join(train.output_dir, DETECTIONS)
    ema = states.get("ema")

    def evaluate() -> dict[str, Any]:
        results.clear()
        results.update(test(cfg, student, kept))
        if ema is not None:
            logger.info("Evaluation of the student's EMA")
            results["ema"] = test(cfg, ema.model, os.path.join(kept, "ema"), part="ema")
        return results

    found: list[HookBase] = []
    if ema is not None:
        found.append(UpdateEMA(ema, student, checkpointer))
    if train.val_loss.period:
        loader = guard_workers(make(labelled_test_loader(cfg), "dataloader.test"))
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
    followed = {name: checkpointer.checkpointables.get(name) for name in FOLLOWED}
    return {
        "results": results,
        **{name: best and best.state_dict() for name, best in followed.items()},
        "metrics_size": metrics_size(cfg.train.output_dir),
        "parameters": sum(p.numel() for p in student_of(model).parameters()),
        "train_images": num_images,
        "train_data": checkpointer.settings.get(TRAINING_DATA),
        "start": checkpointer.start,
        "pretrained": checkpointer.pretrained,
        "test_data": content_of(registered_name(cfg.dataloader.test.dataset)).sha256,
        "seed": cfg.train.seed,
        "device": str(cfg.train.device),
        "processor": processor_name(cfg.train.device),
        "threads": torch.get_num_threads(),
        "processes": comm.get_world_size(),
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
        "code": code_version(),
        "teacher": teacher_facts(model, checkpointer.teacher_results),
    }


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


def labelled_test_loader(cfg: DictConfig) -> DictConfig:
    """The test loader's config with labels: the training mapper under the test's augmentations."""
    name = registered_name(cfg.dataloader.test.dataset)
    if not any(has_objects(r) for r in dataset_dicts(dataset=name, filter_empty=False)):
        raise UserError(
            f"train.val_loss needs labelled test data, but no image of {name} has an object: set "
            "train.val_loss.period=0"
        )
    node, mapper = copy.deepcopy(cfg.dataloader.test), copy.deepcopy(cfg.dataloader.train.mapper)
    if makes_boxes_only(mapper) and "is_train" in node.get("mapper", {}):
        node.mapper.is_train = True
        return node
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
        batch += [{k: item[k] for k in _PICTURED if k in item} for item in items]
        if len(batch) >= settings.num_images:
            break
    return DisparityImages(
        model, batch[: settings.num_images], settings.period, cfg.train.output_dir
    )

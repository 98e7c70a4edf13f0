"""What is compared before a run starts, so that nothing wrong runs on in silence."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence

from detectron2.modeling.meta_arch import FCOS
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer

from ..detectors import channel_order, num_classes
from ..distiller import DistilledDetector
from ..errors import UserError
from ..processes import same_everywhere
from ..teacher import FrozenTeacher


def check_output_dir(path: str) -> None:
    """Refuse to mix a new run into a folder that holds another's checkpoints or metrics."""
    if os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"train.output_dir {path} is a file: choose a folder")
    found = sorted(glob.glob(os.path.join(glob.escape(path), "*.pth")))
    metrics = os.path.join(path, "metrics.json")
    # An empty one is left by a run that was stopped before its first iteration.
    found += [metrics] if os.path.exists(metrics) and os.path.getsize(metrics) > 0 else []
    if found:
        raise UserError(
            f"train.output_dir {path} already holds a run ({os.path.basename(found[0])}): choose "
            "another, continue that run with --resume, or move it away"
        )


def check_same_start(model: nn.Module, iteration: int) -> None:
    """Compare what the processes of a run start from.

    Each reads the files on its own machine, and DistributedDataParallel has compared before that.
    """
    begins = comm.all_gather(iteration)
    if len(set(begins)) > 1:
        raise UserError(
            f"--resume: the processes found checkpoints of different iterations ({begins}): "
            "train.output_dir must be a folder that all machines share"
        )
    teacher = model.teacher.model.state_dict() if isinstance(model, DistilledDetector) else {}
    if not same_everywhere(model.state_dict(), teacher):
        raise UserError(
            "the processes start from different weights: the checkpoints that the config names "
            "must be the same files on all machines"
        )


def check_classes(
    student: nn.Module,
    teacher: FrozenTeacher | None,
    train_classes: Sequence[str],
    test_classes: Sequence[str],
) -> None:
    """Compare the classes of training data, test data, student and, where known, teacher."""
    train_classes, test_classes = list(train_classes), list(test_classes)
    if train_classes != test_classes:
        raise UserError(
            f"the training data's classes are {train_classes}, the test data's {test_classes}: "
            "they must agree in name and order"
        )
    count = num_classes(student)
    if count is not None and count != len(train_classes):
        raise UserError(
            f"the student has {count} classes, the data {len(train_classes)} ({train_classes}): "
            'set num_classes to "auto"'
        )
    if teacher is None or not teacher.check_classes:
        return
    remedy = (
        "take a teacher trained on these classes, or set model.teacher.check_classes=False to "
        "distil its features all the same"
    )
    count = num_classes(teacher.model)
    if count is not None and count != len(train_classes):
        raise UserError(f"the teacher has {count} classes, the data {len(train_classes)}: {remedy}")
    if teacher.class_names is not None and list(teacher.class_names) != train_classes:
        raise UserError(
            f"the teacher's classes are {list(teacher.class_names)}, the data's {train_classes}: "
            f"{remedy}"
        )


def check_image_format(model: nn.Module, dataloader: DictConfig) -> None:
    """Compare the channel order of the loaders with the one that the student wants."""
    if isinstance(model, DistilledDetector):
        wanted = model.input_format
    else:
        wanted = channel_order(model, None, "student")
    for split in ("train", "test"):
        mapper = dataloader[split].get("mapper")
        given = mapper.get("image_format") if mapper is not None else None
        if given is not None and given != wanted:
            raise UserError(
                f"dataloader.{split}.mapper.image_format is {given}, but the student takes "
                f"{wanted}: set both to the same"
            )


def check_mixed_precision(student: nn.Module) -> None:
    """Refuse a detector whose own losses fail under autocast."""
    if isinstance(student, FCOS):
        raise UserError(
            "train.amp.enabled is True, but the losses of Detectron2's FCOS do not run in mixed "
            "precision: set train.amp.enabled=False"
        )


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Every trainable parameter must be in exactly one group, and no other parameter in any."""
    counts: dict[int, int] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    wrong = [name for key, name in trainable.items() if counts.get(key, 0) != 1]
    foreign = len(set(counts) - set(trainable))
    if wrong or foreign:
        raise UserError(
            f"the optimizer holds {len(wrong)} of the model's parameters not exactly once "
            f"({', '.join(wrong[:3]) or 'none'}) and {foreign} that are not the model's: build "
            "optimizer.params from the whole model"
        )

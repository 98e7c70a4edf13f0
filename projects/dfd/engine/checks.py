"""What is compared before a run starts, so that nothing wrong runs on in silence."""

from __future__ import annotations

import glob
import inspect
import logging
import os
from collections.abc import Sequence
from typing import Any

from detectron2.data import DatasetMapper
from detectron2.modeling.meta_arch import FCOS
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer

from ..data import build_evaluator, dataset_report, registered_name
from ..data.evaluator import check_keypoints
from ..distill.contract import channel_order, num_classes
from ..distill.detector import DistilledDetector
from ..distill.inherit import InheritReport
from ..distill.processes import same_everywhere
from ..distill.teacher import FrozenTeacher
from ..errors import UserError
from ..losses import FGDLoss
from ..weights.strict import WeightFile, keys_of_classes
from .config.flat import FlatSettings, differing, flat_settings
from .config.parameters import signature, target_of
from .config.resolve import pretrained_trunks
from .state.run_settings import DEFAULTS

logger = logging.getLogger("dfd")
# Settings of detectors that decide what they compute, and have no weights.
_NO_WEIGHTS = {
    *("num_heads", "window_size", "window_block_indexes", "global_blocks"),
    *("anchor_generator", "box2box_transform", "fuse_type", "num_groups"),
    *("pooler_resolution", "output_size", "sampling_ratio", "pooler_type"),
    *("canonical_box_size", "canonical_level"),
}


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


def check_inherited_classes(
    report: InheritReport | None, teacher: FrozenTeacher, classes: Sequence[str]
) -> None:
    """Refuse a classifier that starts from rows of other classes, which fits by its shape alone.

    Raises:
        UserError: the teacher's classes are known, are others, and such a part was inherited.
    """
    names = teacher.class_names
    if report is None or names is None or list(names) == list(classes):
        return
    wrong = keys_of_classes(report.inherited)
    if wrong:
        raise UserError(
            f"model.inherit: {wrong[0]} would start from the teacher's classes {list(names)}, "
            f"not the data's {list(classes)}: name the parts without it, as roi_heads.box_head."
        )


def check_image_format(
    model: nn.Module,
    dataloader: DictConfig,
    splits: Sequence[str] = ("train", "test"),
    input_format: str | None = None,
) -> None:
    """Compare the channel order of the loaders with the one that the student wants.

    Args:
        input_format: what a config says of it beside the student; None: nothing.
    """
    if isinstance(model, DistilledDetector):
        wanted = model.input_format
    else:
        wanted = channel_order(model, input_format, "student")
    for split in splits:
        mapper = dataloader[split].get("mapper")
        given = mapper.get("image_format") if mapper is not None else None
        given = default_argument(mapper, "image_format") if given is None else given
        if given is not None and given != wanted:
            raise UserError(
                f"dataloader.{split}.mapper.image_format is {given}, but the student takes "
                f"{wanted}: set both to the same"
            )


def frozen_at_random(
    student: nn.Module, node: DictConfig, inherited: Sequence[str] = ()
) -> str | None:
    """What of a student that starts from no weights is constant, in words; None if nothing.

    Args:
        node: of the student, whose timm models may start from weights.
        inherited: keys of what starts from a teacher's.
    """
    if pretrained_trunks(node):
        return None
    frozen = [
        name
        for name, value in student.named_parameters()
        if not value.requires_grad and name not in inherited
    ]
    norms = [
        name
        for name, m in student.named_modules()
        if type(m).__name__.startswith("FrozenBatchNorm") and f"{name}.weight" not in inherited
    ]
    if not frozen and not norms:
        return None
    found = [f"{len(frozen)} parameters, as {frozen[0]}"] if frozen else []
    found += [f"{len(norms)} batch norms, as {norms[0]}"] if norms else []
    return " and ".join(found)


def tell_other_form(node: Any, weights: WeightFile, what: str) -> None:
    """Tell if weights were trained in a network of other heads, windows or anchors than the config.

    No weight shows these, so that any fits. Only runs of this project say what they were.

    Args:
        node: of the detector that took the weights.
        what: names the setting, for the message.
    """
    if not isinstance(node, DictConfig):
        return
    ours = flat_settings({"model": OmegaConf.to_container(node, resolve=True)})
    start = weights.detector
    theirs = {
        f"model.{key.removeprefix(start)}": text
        for key, text in weights.settings.items()
        if key.startswith(start)
    }
    left = weights.settings.get(DEFAULTS, "").split()
    at_default = frozenset(f"model.{key.removeprefix(start)}" for key in left)
    keys = differing(FlatSettings(theirs, at_default), ours) if theirs else []
    keys = [key for key in keys if _NO_WEIGHTS.intersection(key.split("."))]
    if keys:
        before, now = (side.get(keys[0], "not set") for side in (theirs, ours.texts))
        logger.warning(
            "%s: %s was trained with %s %s, the config has %s (and %d more settings that no weight "
            "shows): it is another network",
            what,
            weights.path,
            keys[0].removeprefix("model."),
            before,
            now,
            len(keys) - 1,
        )


def check_unlabelled(model: nn.Module, dataloader: DictConfig) -> None:
    """Tell, besides, if a criterion wants the boxes that such images do not have.

    Raises:
        UserError: there are images without labels, and no teacher that could use them.
    """
    if dataloader.train.get("unlabelled") and not isinstance(model, DistilledDetector):
        raise UserError(
            "dataloader.train.unlabelled names images without labels, but the config has no "
            "model.teacher, and nothing else can learn from them: set it to null"
        )
    if not dataloader.train.get("unlabelled"):
        return
    if any(isinstance(module, FGDLoss) for module in model.head.modules()):
        logger.warning(
            "FGDLoss weighs objects by their boxes; images without labels have none, and are "
            "distilled as if all of them were background"
        )


def check_labels(student: nn.Module, dataloader: DictConfig) -> None:
    """Compare the masks and keypoints that a detector learns with those of mapper and data.

    Raises:
        UserError: the training mapper does not make them, or the training data have none.
    """
    heads, node = getattr(student, "roi_heads", None), dataloader.train.dataset
    for part, learns, setting in (
        ("masks", getattr(heads, "mask_on", False), "use_instance_mask"),
        ("keypoints", getattr(heads, "keypoint_on", False), "use_keypoint"),
    ):
        if not learns:
            continue
        mapper = dataloader.train.get("mapper")
        target = locate_class(mapper)
        if makes_boxes_only(mapper):
            raise UserError(
                f"the student learns {part}, but dataloader.train.mapper is a {target.__name__}, "
                f"which makes boxes only: take Detectron2's DatasetMapper, or a student without "
                f"{part}"
            )
        if issubclass(target, DatasetMapper) and not mapper.get(setting, False):
            raise UserError(
                f"the student learns {part}, but dataloader.train.mapper makes none: set "
                f"dataloader.train.mapper.{setting}=True"
            )
        report = dataset_report(registered_name(node))
        found = getattr(report, part)
        if not found:
            raise UserError(
                f"the student learns {part}, but no annotation of dataset {report.name} has any: "
                f"add them, or take a student without {part}"
            )
        number = getattr(getattr(heads, "keypoint_head", None), "num_keypoints", None)
        if part == "keypoints" and number is not None and set(found) != {number}:
            raise UserError(
                f"the student learns {number} keypoints, but dataset {report.name} has annotations "
                f"of {' and of '.join(map(str, sorted(found)))}: set num_keypoints of its keypoint "
                "head to the number of the data"
            )


def locate_class(node: DictConfig | None) -> type:
    """The class of a lazy call; ``object`` where there is none."""
    target = target_of(node)
    return target if isinstance(target, type) else object


def makes_boxes_only(mapper: DictConfig | None) -> bool:
    """Whether a mapper declares, by its ``boxes_only``, that it makes no masks and no keypoints."""
    return bool(getattr(locate_class(mapper), "boxes_only", False))


def default_argument(node: DictConfig | None, name: str) -> Any:
    """The default of a parameter of a lazy call; None if it has none of that name."""
    parameters = signature(node)[1]
    default = parameters[name].default if name in parameters else None
    return None if default is inspect.Parameter.empty else default


def check_evaluated_labels(student: nn.Module, dataloader: DictConfig) -> None:
    """Compare the keypoints that a detector finds with those of the test data and the sigmas.

    Raises:
        UserError: they are not equally many.
    """
    heads, evaluator = getattr(student, "roi_heads", None), dataloader.get("evaluator")
    number = getattr(getattr(heads, "keypoint_head", None), "num_keypoints", None)
    if number is None or not getattr(heads, "keypoint_on", False) or evaluator is None:
        return
    report = dataset_report(registered_name(dataloader.test.dataset))
    if report.keypoints and target_of(evaluator) is build_evaluator:
        sigmas = tuple(evaluator.get("kpt_oks_sigmas") or ())
        check_keypoints(number, tuple(sorted(report.keypoints)), sigmas, report.name)


def check_mixed_precision(student: nn.Module) -> None:
    """Refuse a detector whose own losses fail under autocast."""
    if isinstance(student, FCOS):
        raise UserError(
            "train.amp.enabled is True, but the losses of Detectron2's FCOS do not run in mixed "
            "precision: set train.amp.enabled=False"
        )


def check_synchronised_norms(model: nn.Module, on_cuda: bool) -> None:
    """Refuse norms that torch can synchronise between CUDA devices alone."""
    if on_cuda or comm.get_world_size() == 1:
        return
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise UserError(
            "the model has norms of torch's SyncBatchNorm, which several processes can have on "
            'CUDA alone: take norm "BN", or for Detectron2\'s layers "NaiveSyncBN"'
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

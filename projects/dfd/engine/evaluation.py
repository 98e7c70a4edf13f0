"""Evaluation: after training, of a checkpoint by ``--eval-only``, and of the teacher."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from ..data import class_names, registered_name
from ..distill.contract import guard_square_padding, num_classes
from ..distill.detector import DistilledDetector
from ..distill.processes import share_buffers
from ..errors import UserError
from ..weights.strict import load_strict, read_weights
from .checks import (
    check_classes,
    check_evaluated_labels,
    check_image_format,
    tell_other_form,
)
from .config.make import make
from .config.resolve import skip_pretrained
from .stop import guard_workers

logger = logging.getLogger("dfd")


# Of a run's folder: what its last evaluation found.
DETECTIONS = "inference"


def test(
    cfg: DictConfig,
    detector: Callable[[list[dict]], list[dict]],
    keep: str | None = None,
    part: str = "",
) -> dict[str, Any]:
    """Evaluate a detector on the test data with the configured evaluator, if there is one.

    Args:
        keep: folder for what the evaluator writes, unless the config names one.
        part: subfolder of the one that the config names, for what is not the student.
    """
    if isinstance(detector, nn.Module):
        # Each process has normalised other images; what is evaluated is what is saved.
        share_buffers(detector)
    if cfg.dataloader.get("evaluator") is None:
        return {}
    evaluator = copy.deepcopy(cfg.dataloader.evaluator)
    named = evaluator.get("output_dir") if isinstance(evaluator, DictConfig) else keep
    if named and part and isinstance(evaluator, DictConfig):
        # What a run's EMA or teacher finds is not to take the place of the student's.
        evaluator.output_dir = os.path.join(named, part)
    elif named is None and keep is not None and "output_dir" in evaluator:
        evaluator.output_dir = keep
    results = inference_on_dataset(
        detector,
        guard_workers(make(cfg.dataloader.test, "dataloader.test")),
        make(evaluator, "dataloader.evaluator"),
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
    skip_pretrained(node)
    student = make(node, "model").to(cfg.train.device)
    guard_square_padding(student, "student")
    order = cfg.model.get("input_format") if "student" in cfg.model else None
    check_image_format(student, cfg.dataloader, splits=("test",), input_format=order)
    weights = read_weights(cfg.train.init_checkpoint, "train.init_checkpoint")
    load_strict(student, weights, "train.init_checkpoint", input_format=order)
    tell_other_form(node, weights, "train.init_checkpoint")
    data_classes = class_names(registered_name(cfg.dataloader.test.dataset))
    if weights.class_names is None:
        check_classes(student, None, data_classes, data_classes)  # Their number.
    elif weights.class_names != data_classes:
        raise UserError(
            f"train.init_checkpoint was trained on {weights.class_names}, but the test data's "
            f"classes are {data_classes}"
        )
    check_evaluated_labels(student, cfg.dataloader)
    return test(cfg, student)


def evaluate_teacher(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """Evaluate the teacher of a model, in its own channel order and in fp32, on the test data.

    Returns:
        The results, in every process.

    Raises:
        UserError: there is no teacher or no evaluator, or the teacher's classes are not the data's.
    """
    if not isinstance(model, DistilledDetector):
        raise UserError(
            "--eval-teacher: the config has no model.teacher: take the config of a distilled "
            "student, or evaluate this detector with --eval-only"
        )
    if cfg.dataloader.get("evaluator") is None:
        raise UserError("the teacher cannot be evaluated: the config has no dataloader.evaluator")
    teacher = model.teacher
    classes = class_names(registered_name(cfg.dataloader.test.dataset))
    count = num_classes(teacher.model)
    # With model.teacher.check_classes=False nothing has compared them yet.
    if count is not None and count != len(classes):
        raise UserError(
            f"the teacher cannot be evaluated: it has {count} classes, the test data {len(classes)}"
        )
    if teacher.class_names is not None and list(teacher.class_names) != classes:
        raise UserError(
            f"the teacher cannot be evaluated: its classes are {list(teacher.class_names)}, the "
            f"test data's {classes}"
        )
    detect = partial(teacher.detect, input_format=model.input_format, device=cfg.train.device)
    results = test(cfg, detect, part="teacher")
    # The evaluator gives them to the main process alone.
    return comm.all_gather(results)[0]


def teacher_results(
    cfg: DictConfig, model: nn.Module, known: dict[str, Any] | None
) -> dict[str, Any] | None:
    """The teacher's results before iteration 0, where the config asks for them.

    Args:
        known: results that a resumed run has measured already; None if there are none.

    Raises:
        UserError: the teacher's AP is below ``train.min_teacher_ap``.
    """
    least = cfg.train.min_teacher_ap
    if not isinstance(model, DistilledDetector):
        return None
    if least is None and not cfg.train.eval_teacher_first:
        return known
    results = known or evaluate_teacher(cfg, model)
    boxes = results.get("bbox")
    if not boxes:
        raise UserError("the teacher's AP cannot be measured: dataloader.evaluator gives no box AP")
    logger.info(
        "Teacher's results on the test data: %s",
        ", ".join(f"{name} {value:.2f}" for name, value in boxes.items()),
    )
    # Written so that an AP that is no number does not pass.
    if least is not None and not boxes["AP"] >= least:
        raise UserError(
            f"the teacher's AP on the test data is {boxes['AP']:.2f}, below train.min_teacher_ap="
            f"{least}: correct model.teacher, or lower the bound"
        )
    return results

"""Evaluation: after training, or of a checkpoint by ``--eval-only``."""

from __future__ import annotations

from typing import Any

from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from ..data import class_names, registered_name
from ..detectors import guard_square_padding
from ..errors import UserError
from ..weights import load_strict, read_weights
from .settings import make


def test(cfg: DictConfig, student: nn.Module) -> dict[str, Any]:
    """Evaluate a detector on the test data with the configured evaluator, if there is one."""
    if "evaluator" not in cfg.dataloader:
        return {}
    results = inference_on_dataset(
        student,
        make(cfg.dataloader.test, "dataloader.test"),
        make(cfg.dataloader.evaluator, "dataloader.evaluator"),
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
    student = make(node, "model").to(cfg.train.device)
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

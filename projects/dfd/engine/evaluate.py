"""Evaluation: after training, or of a checkpoint by ``--eval-only``."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from ..data import class_names, registered_name
from ..detectors import guard_square_padding
from ..errors import UserError
from ..weights import load_strict, read_weights


def share_buffers(model: nn.Module) -> None:
    """Give every process the buffers of the main one, which are those of the checkpoints.

    Each process's batch norms count its own images; evaluated so, a run's AP would be that of as
    many detectors, none of which is saved.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


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

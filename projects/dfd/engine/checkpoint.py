"""Checkpoints whose ``model`` entry is the bare student under stock Detectron2 keys."""

from __future__ import annotations

import os
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..errors import UserError


class StudentCheckpointer(DetectionCheckpointer):
    """Saves the student so that an unmodified Detectron2 config loads it.

    What only resuming needs (trainer, optimizer, head) and the class names are entries beside
    ``model``. The teacher is in none of them.
    """

    def __init__(
        self, student: nn.Module, save_dir: str, *, class_names: list[str], **checkpointables: Any
    ) -> None:
        super().__init__(student, save_dir, **checkpointables)
        self.class_names = class_names

    def save(self, name: str, **kwargs: Any) -> None:
        super().save(name, class_names=self.class_names, **kwargs)

    def _torch_load(self, f: str) -> Any:
        return torch.load(f, map_location="cpu", weights_only=True)

    def _load_model(self, checkpoint: Any) -> Any:
        names = set(self.model.state_dict())
        incompatible = super()._load_model(checkpoint)
        if incompatible is not None and names <= set(incompatible.missing_keys):
            raise UserError(
                "train.init_checkpoint holds none of the student's weights: it belongs to another "
                "model"
            )
        return incompatible

    def get_checkpoint_file(self) -> str:
        path = super().get_checkpoint_file()
        if path and not os.path.isfile(path):
            raise UserError(
                f"--resume: {os.path.join(self.save_dir, 'last_checkpoint')} names {path}, which "
                "is not there: write the name of one that is into it"
            )
        return path

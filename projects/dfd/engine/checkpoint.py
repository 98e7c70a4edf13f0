"""Checkpoints whose ``model`` entry is the bare student under stock Detectron2 keys."""

from __future__ import annotations

import os
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..errors import UserError, first_line
from ..weights import read_arrays


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

    def _load_file(self, filename: str) -> Any:
        try:
            if not filename.endswith(".pkl"):
                return super()._load_file(filename)
            data = read_arrays(filename)
        except Exception as error:
            raise UserError(
                f"{filename} is not a readable weight file: {first_line(error)}"
            ) from error
        if "__author__" in data and "model" in data:
            return data
        # Of Caffe2, as Detectron2's own checkpointer takes it.
        blobs = data.get("blobs", data)
        blobs = {key: value for key, value in blobs.items() if not key.endswith("_momentum")}
        return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}

    def _torch_load(self, f: str) -> Any:
        return torch.load(f, map_location="cpu", weights_only=True)

    def _load_model(self, checkpoint: Any) -> Any:
        backbone = {
            key
            for key, value in self.model.state_dict().items()
            if key.startswith("backbone.") and value.is_floating_point()
        }
        incompatible = super()._load_model(checkpoint)
        absent = backbone & set(incompatible.missing_keys)
        # Fewer than half come from another detector, a few small shapes agreeing by chance.
        if len(absent) > len(backbone) / 2:
            raise UserError(
                f"train.init_checkpoint holds {len(backbone) - len(absent)} of the {len(backbone)} "
                f"weights of the student's backbone (not {', '.join(sorted(absent)[:2])}, ...): it "
                "belongs to another model"
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

"""The student of a finished run as something that is given images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import transforms as T
from detectron2.structures import Instances
from torch import nn

from ..engine.config.resolve import skip_pretrained
from ..engine.run_folder import RunFolder
from ..errors import UserError
from ..weights.strict import WeightFile, load_strict, read_weights

FINAL = "model_final.pth"


@dataclass(frozen=True)
class Student:
    """A detector with what its images go through, as in the evaluation of its run.

    Args:
        model: in evaluation mode, on its device.
        classes: their names, by the number that a detection has.
        augmentations: resizing, say.
        image_format: the channel order that it wants, "BGR" or "RGB".
    """

    model: nn.Module
    classes: Sequence[str]
    augmentations: T.AugmentationList
    image_format: str

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Instances:
        """The detections on one image, with ``pred_boxes`` in its own pixels, on the CPU.

        Args:
            image: (height, width, 3) uint8 in ``image_format``.
        """
        height, width = image.shape[:2]
        seen = T.AugInput(image)
        self.augmentations(seen)
        pixels = torch.from_numpy(np.ascontiguousarray(seen.image.transpose(2, 0, 1)))
        (result,) = self.model([{"image": pixels, "height": height, "width": width}])
        return result["instances"].to("cpu")


def load_detector(
    run: RunFolder, *, weights: str = FINAL, device: str = "auto"
) -> tuple[nn.Module, WeightFile]:
    """The evaluated model of a run, in evaluation mode, and the file that its weights are from.

    Args:
        weights: a file in the run's folder, or a path.
        device: "auto": CUDA where there is one, else the CPU.

    Raises:
        UserError: there is no such file, or it does not fit.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    node = run.student
    skip_pretrained(node)
    model = instantiate(node).to(device).eval()
    path = os.path.join(run.folder, weights)
    read = read_weights(path, f"--run {run.name}")
    load_strict(model, read, f"--run {run.name}")
    return model, read


def load_student(run: RunFolder, *, weights: str = FINAL, device: str = "auto") -> Student:
    """As ``load_detector``, with all that an image goes through.

    Raises:
        UserError: as there; or the file names no classes, or the run's test data go through a
            mapper without ``augmentations``.
    """
    mapper = run.cfg.dataloader.test.get("mapper") or {}
    if "augmentations" not in mapper or "image_format" not in mapper:
        raise UserError(
            f"--run {run.name}: dataloader.test.mapper of its config has no augmentations and "
            "image_format, so what an image goes through is not known"
        )
    model, read = load_detector(run, weights=weights, device=device)
    if read.class_names is None:
        raise UserError(f"{read.path} names no classes: take a checkpoint of this project")
    augmentations = [instantiate(a) for a in mapper.augmentations]
    return Student(
        model, read.class_names, T.AugmentationList(augmentations), str(mapper.image_format)
    )

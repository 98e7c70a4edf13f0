"""The student of a finished run as something that is given images."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import transforms as T
from detectron2.structures import Instances
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ..data.two_sizes import ResizeBy, TwoSizeMapper
from ..distill.contract import guard_square_padding
from ..engine.checks import locate_class
from ..engine.config.resolve import skip_pretrained
from ..engine.run_folder import RunFolder
from ..engine.state.checkpoint import FINAL
from ..errors import UserError, first_line
from ..weights.files import file_sha256
from ..weights.strict import WeightFile, load_strict, read_weights
from .inputs import UnreadableError
from .one_size import OneSize
from .onnx_model import OnnxModel
from .program_model import ProgramModel


@dataclass(frozen=True)
class Student:
    """A detector with what its images go through, as in the evaluation of its run.

    Args:
        model: in evaluation mode, on its device.
        classes: their names, by the number that a detection has.
        augmentations: resizing, say.
        image_format: the channel order that it wants, "BGR" or "RGB".
        described: the augmentations as the config has them, plain.
        weights_sha256: of the file that its weights are from; empty if it is not known.
    """

    model: Callable[[list[dict[str, Any]]], list[dict[str, Instances]]]
    classes: Sequence[str]
    augmentations: T.AugmentationList
    image_format: str
    described: Sequence[Mapping[str, Any]] = ()
    weights_sha256: str = ""

    def with_model(self, model: Callable[..., Any]) -> Student:
        """The same with another form of the network, which is given the same pixels."""
        return dataclasses.replace(self, model=model)

    def of_size(self, height: int, width: int) -> Student:
        """The same with images that are resized to just this, whatever their ratio."""
        resize = T.AugmentationList([OneSize(self.augmentations, height, width)])
        return dataclasses.replace(self, augmentations=resize)

    def squashes(self, image: np.ndarray) -> bool:
        """Whether ``of_size`` has given the image another ratio than the evaluation would."""
        return any(isinstance(a, OneSize) and a.squashes(image) for a in self.augmentations.augs)

    def pixels(self, image: np.ndarray) -> Tensor:
        """(3,height,width) uint8 of an image (height, width, 3) as the network sees it.

        Raises:
            UnreadableError: it does not go through the augmentations.
        """
        seen = T.AugInput(image)
        try:
            self.augmentations(seen)
        except Exception as error:  # They raise whatever they meet, such as a side of no pixel.
            height, width = image.shape[:2]
            raise UnreadableError(
                f"an image of {height} x {width} pixels cannot be made what the network sees "
                f"({first_line(error)})"
            ) from error
        return torch.from_numpy(np.ascontiguousarray(seen.image.transpose(2, 0, 1)))

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Instances:
        """The detections on one image, with ``pred_boxes`` in its own pixels, on the CPU.

        Args:
            image: (height, width, 3) uint8 in ``image_format``.
        """
        height, width = image.shape[:2]
        batch = [{"image": self.pixels(image), "height": height, "width": width}]
        (result,) = self.model(batch)
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
    order = run.cfg.model.get("input_format") if run.distilled else None
    load_strict(model, read, f"--run {run.name}", input_format=order)
    guard_square_padding(model, "student")
    return model, read


def _seen_by_student(mapper: DictConfig) -> list[dict[str, Any]]:
    """What a mapper does to the student's image, as a config has it, plain."""
    described = OmegaConf.to_container(mapper.augmentations, resolve=True)
    if issubclass(locate_class(mapper), TwoSizeMapper):
        # The augmentations make the teacher's image.
        scale = 1 / instantiate(mapper.teacher_scale)
        described.append({"_target_": f"{ResizeBy.__module__}.ResizeBy", "scale": scale})
    return described


def _check_origin(run: RunFolder, exported: str, told: Mapping[str, Any], weights: str) -> None:
    """Refuse what was exported of another run, as far as the file tells.

    Args:
        told: its metadata, with ``classes`` as a list.
        weights: the file that it should be of; ``FINAL``: any of the run's folder will do.

    Raises:
        UserError: it was, or is of other weights.
    """
    folder = Path(run.folder)
    if weights != FINAL and not (folder / weights).is_file():
        raise UserError(f"--weights: no such file: {folder / weights}")
    sha256 = told.get("weights_sha256")
    if sha256 is None:  # An older version wrote the file.
        named = {key.removeprefix("AP-") for key in run.scores if key.startswith("AP-")}
        if named and named != set(told["classes"]):
            raise UserError(
                f"{exported} has the classes {told['classes']}, --run {run.name} "
                f"{sorted(named)}: it is of another run"
            )
        return
    paths = [folder / weights]
    if weights == FINAL:
        kinds = (".pth", ".pkl", ".safetensors")
        paths += sorted(path for path in folder.iterdir() if path.suffix in kinds)
    if any(file_sha256(path) == sha256 for path in dict.fromkeys(paths) if path.is_file()):
        return
    if weights != FINAL:
        raise UserError(
            f"{exported} was exported from other weights (sha256 {sha256[:12]}) than --weights "
            f"{weights}: name those, or export these"
        )
    raise UserError(
        f"{exported} was exported from weights (sha256 {sha256[:12]}) that --run {run.name} "
        "does not have: name the run that it is of, or the file of those weights with --weights"
    )


def load_student(
    run: RunFolder, *, weights: str = FINAL, device: str = "auto", exported: str | None = None
) -> Student:
    """As ``load_detector``, with all that an image goes through.

    Args:
        exported: take the network from this file of ``dfd export`` instead, which must be of
            weights or of another file of the run's folder; device is then not looked at.

    Raises:
        UserError: as there; or the file names no classes or was exported of another run, or the
            run's test data go through a mapper without ``augmentations``.
    """
    mapper = run.cfg.dataloader.test.get("mapper") or {}
    if "augmentations" not in mapper or "image_format" not in mapper:
        raise UserError(
            f"--run {run.name}: dataloader.test.mapper of its config has no augmentations and "
            "image_format, so what an image goes through is not known"
        )
    described = _seen_by_student(mapper)
    image_format, sha256 = str(mapper.image_format), ""
    if exported is None:
        model, read = load_detector(run, weights=weights, device=device)
        classes, sha256 = read.class_names, read.sha256
        if classes is None:
            raise UserError(f"{read.path} names no classes: take a checkpoint of this project")
    elif exported.endswith(".pt2"):
        model = ProgramModel(exported)
        classes = model.metadata["classes"]
        if model.metadata["image_format"] != image_format:
            raise UserError(
                f"{exported} wants {model.metadata['image_format']} images, --run {run.name} "
                f"{image_format}: it is of another run"
            )
    else:
        model = OnnxModel(exported)
        classes = json.loads(model.metadata["classes"])
        told = json.loads(model.metadata["augmentations"]), model.metadata["image_format"]
        if told != (described, image_format):
            raise UserError(
                f"{exported} wants its images otherwise than --run {run.name} makes them: it is of "
                "another run"
            )
    if exported is not None:
        _check_origin(run, exported, {**model.metadata, "classes": classes}, weights)
    augmentations = T.AugmentationList([instantiate(OmegaConf.create(a)) for a in described])
    student = Student(model, classes, augmentations, image_format, described, sha256)
    if isinstance(model, ProgramModel):
        return student.of_size(model.metadata["height"], model.metadata["width"])
    return student

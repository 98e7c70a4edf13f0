"""What an analysis starts from: a finished distilled run, its checkpoints and its test images."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import BoxMode
from omegaconf import DictConfig
from torch import Tensor, nn

from ...data import class_names, dataset_dicts, registered_name
from ...deploy.inputs import evenly_spaced
from ...distill.contract import guard_square_padding
from ...distill.detector import DistilledDetector
from ...distill.head import DFDHead
from ...engine.checks import check_classes, check_image_format
from ...engine.config.load import load_config
from ...engine.config.make import make
from ...engine.config.resolve import resolve_config, skip_pretrained
from ...engine.config.saved import REMEDY, ForeignCodeError, read_config
from ...engine.run_folder import SUMMARY, read_summary
from ...engine.state.checkpoint import FINAL
from ...errors import UserError, first_line
from ...weights.strict import load_strict, read_weights

_CHECKPOINT = re.compile(r"model_(\d+)\.pth")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file and the number of iterations after which it was written."""

    iteration: int
    path: str


@dataclass(frozen=True)
class Snapshot:
    """The student and the head, whose adapters are trained, after some iterations; eval mode."""

    iteration: int
    student: nn.Module
    head: DFDHead


@dataclass(frozen=True)
class LabelledImage:
    """A test image as the student gets it; boxes are (M,4) XYXY in pixels of the input.

    ``item`` is Detectron2's, ``scale`` what brings the pixels of the original to the input's, (4,).
    """

    item: dict[str, Any]
    scale: np.ndarray
    labels: np.ndarray
    label_classes: np.ndarray
    crowds: np.ndarray
    crowd_classes: np.ndarray


def load_run(
    folder: str, overrides: Sequence[str] = (), *, trusted: bool = False
) -> DictConfig:
    """The resolved config of a finished distilled run.

    Args:
        trusted: whether what the config names may be of any module, see ``read_config``.

    Raises:
        UserError: a folder or file is missing or cannot be read, the run has not finished or has
            no teacher, or an override does not fit.
    """
    if not os.path.isdir(folder):
        raise UserError(f"--run: no such folder: {folder}")
    for file, reason in (("config.yaml", "it is no run"), (FINAL, "the run has not finished")):
        if not os.path.isfile(os.path.join(folder, file)):
            raise UserError(f"--run: {folder} has no {file}: {reason}")
    path = os.path.join(folder, "config.yaml")
    if not trusted:
        try:
            read_config(path, trusted=False)
        except ForeignCodeError as error:
            raise UserError(f"--run: {path} is not read: {error}; {REMEDY}") from error
        except Exception as error:
            raise UserError(f"--run: {path} cannot be loaded: {first_line(error)}") from error
    cfg = load_config(path, overrides)
    if "student" not in cfg.model:
        raise UserError(
            f"--run: {folder} is a run without a teacher, so there is no disparity to analyse: "
            "give one of a distilled student"
        )
    skip_pretrained(cfg.model.student)
    return resolve_config(cfg)


def trained_iterations(folder: str, cfg: DictConfig) -> int:
    """How many iterations a run had, which may have been stopped early."""
    return read_summary(os.path.join(folder, SUMMARY)).get("iterations", cfg.train.max_iter)


def find_checkpoints(folder: str, *, max_iter: int, limit: int) -> list[Checkpoint]:
    """A run's checkpoints by iteration; if there are more than ``limit``, so many evenly spaced.

    The last is always ``model_final.pth``; one that was written after as many iterations is it.

    Args:
        max_iter: the length of the run.
    """
    if limit < 1:
        raise UserError(f"--max-checkpoints {limit}: it must be 1 or more")
    found = [
        Checkpoint(int(match[1]) + 1, os.path.join(folder, match[0]))
        for match in map(_CHECKPOINT.fullmatch, sorted(os.listdir(folder)))
        if match and int(match[1]) + 1 < max_iter
    ]
    found = sorted(found, key=lambda checkpoint: checkpoint.iteration)
    found.append(Checkpoint(max_iter, os.path.join(folder, FINAL)))
    # Counted from the end, so that a limit of 1 leaves the last.
    places = np.linspace(0, len(found) - 1, min(limit, len(found)))
    return [found[-1 - place] for place in places.round().astype(int)[::-1]]


def build_detector(cfg: DictConfig, folder: str) -> DistilledDetector:
    """The detector of a run with its teacher loaded, without the student's trained weights.

    Raises:
        UserError: the test data cannot be read or have other classes, or the teacher's weights
            are not there, or not those of the training.
    """
    classes = class_names(registered_name(cfg.dataloader.test.dataset))
    model = make(cfg.model, "model").to(cfg.train.device).eval()
    guard_square_padding(model.student, "student")
    check_image_format(model, cfg.dataloader)
    check_classes(model.student, model.teacher, classes, classes)
    if model.teacher.weights is None:
        raise UserError(
            f"--run: the teacher of {folder} had random weights, which no run keeps: there is "
            "nothing to compare with"
        )
    summary = read_summary(os.path.join(folder, SUMMARY))
    trained_under = (summary.get("teacher") or {}).get("sha256")
    if trained_under and trained_under != model.teacher.weights.sha256:
        raise UserError(
            f"model.teacher.checkpoint: {model.teacher.weights.path} is not the teacher that "
            f"{folder} was trained under (sha256 {model.teacher.weights.sha256[:12]}, not "
            f"{trained_under[:12]}): give its file with model.teacher.checkpoint=..."
        )
    return model


def load_snapshots(
    model: DistilledDetector, checkpoints: Sequence[Checkpoint], classes: Sequence[str]
) -> list[Snapshot]:
    """A copy of student and head for every checkpoint, on the model's device.

    Args:
        classes: of the test data.

    Raises:
        UserError: a checkpoint cannot be read, does not fit the config, or is of other classes.
    """
    snapshots = []
    for checkpoint in checkpoints:
        student, head = copy.deepcopy(model.student).eval(), copy.deepcopy(model.head).eval()
        weights = read_weights(checkpoint.path, "--run")
        load_strict(student, weights, "--run", input_format=model.input_format)
        if weights.class_names is not None and list(weights.class_names) != list(classes):
            raise UserError(
                f"--run: {checkpoint.path} was trained on {weights.class_names}, but the test "
                f"data's classes are {list(classes)}"
            )
        _load_adapters(head, checkpoint.path)
        snapshots.append(Snapshot(checkpoint.iteration, student, head))
    return snapshots


def _load_adapters(head: DFDHead, path: str) -> None:
    """Bring the adapters to their trained weights, which a checkpoint keeps beside the student."""
    if not head.adapters.state_dict():
        return
    content = torch.load(path, map_location="cpu", weights_only=True)
    state = {
        key.removeprefix("adapters."): value
        for key, value in (content.get("head") or {}).items()
        if key.startswith("adapters.") and isinstance(value, Tensor)
    }
    try:
        head.adapters.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--run: {path} does not hold the head's adapters: {reason}") from error


class TestImages:
    """The test images of a run, or so many of them evenly spaced, each as the student gets it."""

    __test__ = False  # pytest would take the name for one of its own.

    def __init__(self, cfg: DictConfig, num_images: int | None) -> None:
        """
        Raises:
            UserError: the data cannot be read, or none of these images has a labelled box.
        """
        if num_images is not None and num_images < 1:
            raise UserError(f"--num-images {num_images}: it must be 1 or more")
        self.name = registered_name(cfg.dataloader.test.dataset)
        records = dataset_dicts(dataset=self.name, filter_empty=False)
        self._records = {_identity(record): record for record in records}
        # Straight from the data set: the loader itself would read every image before these.
        self._dataset = make(cfg.dataloader.test, "dataloader.test").dataset
        self.total = len(self._dataset)
        self._indices = evenly_spaced(self.total, num_images or self.total)
        annotations = (a for record in records for a in record.get("annotations", ()))
        if all(a.get("iscrowd", 0) for a in annotations):
            raise UserError(f"the test data {self.name} have no labelled box: nothing can be told")

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[LabelledImage]:
        for index in self._indices:
            item = self._dataset[index]
            yield label_image(item, self._records[_identity(item)].get("annotations", ()))


def _identity(record: dict[str, Any]) -> tuple[Any, str]:
    """A file may be listed twice, with other labels."""
    return record.get("image_id"), record["file_name"]


def label_image(item: dict[str, Any], annotations: Sequence[dict[str, Any]]) -> LabelledImage:
    """Join a mapped image with its labels.

    Args:
        item: Detectron2's, with ``image`` (3,h,w) and the original's ``height`` and ``width``.
        annotations: Detectron2's, in pixels of the original.
    """
    height, width = item["image"].shape[-2:]
    scale = np.array([width / item["width"], height / item["height"]] * 2)
    boxes = [
        BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations
    ]
    # The inverse of what Detectron2 does with detections: nothing but a resize is undone.
    mapped = np.array(boxes, dtype=float).reshape(-1, 4) * scale
    mapped = mapped.clip(0, [width, height] * 2)
    classes = np.array([a["category_id"] for a in annotations], dtype=int)
    crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool)
    # A box wholly outside its image is clipped to nothing.
    kept = (mapped[:, 2:] > mapped[:, :2]).all(axis=1)
    return LabelledImage(
        item=item,
        scale=scale,
        labels=mapped[kept & ~crowd],
        label_classes=classes[kept & ~crowd],
        crowds=mapped[kept & crowd],
        crowd_classes=classes[kept & crowd],
    )

"""Weights of a whole detector: found, read, and loaded strictly."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from ..errors import UserError, first_line
from .files import file_sha256, read_file

# Kept by old checkpoints, rebuilt from the config by today's Detectron2.
_REBUILT = ("cell_anchors", "pixel_mean", "pixel_std")
# Parts of a key whose tensors have a row for each class, in Detectron2's detectors and ours.
_OF_CLASSES = ("cls_score", "box_predictor", "cls_preds", "cls_out", "mask_head.predictor")


@dataclass(frozen=True)
class WeightFile:
    """The content of a weight file: ``model`` maps names to tensors; the rest where it is known.

    ``settings`` are those of the run that wrote it, by key, where it is a run of this project.
    """

    path: str
    sha256: str
    model: dict[str, Tensor]
    class_names: list[str] | None = field(default=None)
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def detector(self) -> str:
        """Where in the settings the detector is whose weights they are."""
        distilled = any(name.startswith("model.student.") for name in self.settings)
        return "model.student." if distilled else "model."

    @property
    def input_format(self) -> str | None:
        """BGR or RGB, what it was trained with; None if it is not told.

        Where it was distilled, the whole may have been given another than its student's default.
        """
        for key in ("model.input_format", f"{self.detector}input_format"):
            if self.settings.get(key) in ("BGR", "RGB"):
                return self.settings[key]
        return None

    def channels(self, key: str) -> Tensor | None:
        """A number for each channel, the mean or deviation of its training; None: not told."""
        if key in self.model:
            return self.model[key]
        numbers: list[float] = []
        with contextlib.suppress(ValueError):  # An expression.
            while (text := self.settings.get(f"{self.detector}{key}.{len(numbers)}")) is not None:
                numbers.append(float(text))
            return torch.tensor(numbers) if numbers else None
        return None


def local_path(path: str, what: str) -> str:
    """Resolve a path or URL to a local file.

    Args:
        path: a path, or a URL that Detectron2's PathManager knows (``detectron2://``, ``https://``).
        what: names the setting, for the message.

    Raises:
        UserError: there is no such file, or it cannot be fetched.
    """
    try:
        local = PathManager.get_local_path(os.path.expanduser(path))
    except Exception as error:
        raise UserError(f"{what}: {path} cannot be fetched ({first_line(error)})") from error
    if os.path.isdir(local):
        raise UserError(f"{what}: {path} is a folder: name a file in it")
    if not os.path.isfile(local):
        raise UserError(f"{what}: no such file: {path}")
    return local


def read_weights(path: str, what: str) -> WeightFile:
    """Read a Detectron2 zoo ``.pkl`` (numpy), a ``.pth``, ours or anybody's, or ``.safetensors``.

    The weights are what the file has under ``model`` or, as mmdetection's, ``state_dict``.

    Raises:
        UserError: no such file, not a weight file, or one that refers to more than weights.
    """
    local = local_path(path, what)
    sha256 = file_sha256(local)
    try:
        content = read_file(local)
    except Exception as error:
        raise UserError(
            f"{what}: {path} is not a readable weight file: {first_line(error)}"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{what}: {path} holds a {type(content).__name__}, not named weights")
    if content.get("matching_heuristics"):
        raise UserError(
            f"{what}: {path} needs Detectron2's name-matching heuristics (a backbone pre-trained "
            "on ImageNet?), which are never strict: give a whole detector's checkpoint"
        )
    state = named_weights(content)
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{what}: {path} holds no named weights")
    model = {}
    for key, value in state.items():
        if isinstance(value, np.ndarray | np.generic):
            value = torch.from_numpy(np.asarray(value).copy())
        if not isinstance(value, Tensor):
            raise UserError(f"{what}: {path} holds {key!r}, a {type(value).__name__}, not a tensor")
        model[key.removeprefix("module.")] = value
    settings = content.get("settings")
    settings = dict(settings) if isinstance(settings, Mapping) else {}
    return WeightFile(path, sha256, model, class_names_of(content), settings)


def named_weights(content: Mapping[str, Any]) -> Any:
    """The weights in the content of a file, whatever training has kept beside them."""
    return content.get("model", content.get("state_dict", content))


def own_layout(model: nn.Module, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights under the keys of a model that knows other layouts of its kind, such as YOLOX.

    Those of any other model, and those that have its keys already, stay as they are.
    """
    convert = getattr(model, "convert_weights", None)
    return dict(weights) if convert is None else convert(weights)


def keys_of_classes(keys: Iterable[str]) -> list[str]:
    """Those of weights that have a row for each class."""
    return [key for key in keys if any(part in key for part in _OF_CLASSES)]


def class_names_of(content: Mapping[str, Any]) -> list[str] | None:
    """Those that the file tells: of this project, or of mmdetection's versions 2 and 3."""
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    dataset = meta.get("dataset_meta")
    dataset = dataset if isinstance(dataset, Mapping) else {}
    for names in (content.get("class_names"), meta.get("CLASSES"), dataset.get("classes")):
        if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
            return list(names)
    return None


def load_strict(
    model: nn.Module, weights: WeightFile, what: str, *, input_format: str | None = None
) -> None:
    """Load every weight, or raise.

    A published layout that the model knows (``own_layout``) is brought into its own.

    Tolerated: anchors and pixel statistics that old checkpoints carry (the statistics must equal
    the model's), a batch-norm counter on one side only, and the renamings that Detectron2's own
    modules do.

    Args:
        input_format: the order of channels that the model is given; None: its own attribute.

    Raises:
        UserError: a key is missing, unexpected, of another shape or no floating-point number, a
            weight is NaN, or the pixel mean, standard deviation or order of channels of its
            training differ from the config's; they are named.
    """
    check_pixels(model, weights, what, input_format or getattr(model, "input_format", None))
    expected = model.state_dict()
    state = own_layout(model, weights.model)
    # A detector that keeps them in its state has them there as weights.
    state = {k: v for k, v in state.items() if k in expected or not any(x in k for x in _REBUILT)}
    problems = [
        f"{key} has shape {tuple(value.shape)}, the model {tuple(expected[key].shape)}"
        for key, value in state.items()
        if key in expected and value.shape != expected[key].shape
    ]
    problems += [
        f"{key} {_spoilt(value)}"
        for key, value in state.items()
        if key in expected and expected[key].is_floating_point() and _spoilt(value)
    ]
    if not problems:
        # Detectron2 fills in absent running statistics of frozen norms without a word.
        absent = [k for k in expected if k not in state and k.endswith(("_mean", "_var"))]
        result = model.load_state_dict(dict(state), strict=False)
        missing = [k for k in result.missing_keys if not k.endswith("num_batches_tracked")]
        unexpected = [k for k in result.unexpected_keys if not k.endswith("num_batches_tracked")]
        problems = [f"{key} is missing" for key in dict.fromkeys(missing + absent)]
        problems += [f"{key} is unexpected" for key in unexpected]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise UserError(
            f"{what}: {weights.path} does not fit the model: {'; '.join(problems[:5])}{more}"
        )


def _spoilt(value: Tensor) -> str:
    """Why a tensor can be no weight, if it cannot; a mask that a network keeps may be infinite."""
    if not value.is_floating_point():
        return f"is of {value.dtype}, no floating-point numbers"
    return "holds NaN: its training diverged" if value.isnan().any() else ""


def check_pixels(
    model: nn.Module, weights: WeightFile, what: str, input_format: str | None
) -> None:
    """Compare what pixels become with what they became in the training of these weights.

    Old files hold mean and deviation beside the weights, runs of this project the whole config.

    Raises:
        UserError: it is told, and something else.
    """
    for key in ("pixel_mean", "pixel_std"):
        ours, theirs = getattr(model, key, None), weights.channels(key)
        if ours is None or theirs is None:
            continue
        ours, theirs = ours.flatten().float().cpu(), theirs.flatten().float()
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4):
            raise UserError(
                f"{what}: {weights.path} was trained with {key} {theirs.tolist()}, but the config "
                f"has {ours.tolist()}"
            )
    trained = weights.input_format
    if trained and input_format and trained != input_format:
        raise UserError(
            f"{what}: {weights.path} was trained with input_format {trained}, but the config has "
            f"{input_format}"
        )

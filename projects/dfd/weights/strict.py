"""Weights of a whole detector: found, read, and loaded strictly."""

from __future__ import annotations

import os
from collections.abc import Mapping
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


@dataclass(frozen=True)
class WeightFile:
    """The content of a weight file: ``model`` maps names to tensors; the rest where it is known."""

    path: str
    sha256: str
    model: dict[str, Tensor]
    class_names: list[str] | None = field(default=None)


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
    return WeightFile(path, sha256, model, _class_names(content))


def named_weights(content: Mapping[str, Any]) -> Any:
    """The weights in the content of a file, whatever training has kept beside them."""
    return content.get("model", content.get("state_dict", content))


def own_layout(model: nn.Module, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights under the keys of a model that knows other layouts of its kind, such as YOLOX.

    Those of any other model, and those that have its keys already, stay as they are.
    """
    convert = getattr(model, "convert_weights", None)
    return dict(weights) if convert is None else convert(weights)


def _class_names(content: Mapping[str, Any]) -> list[str] | None:
    """Those that the file tells: of this project, or of mmdetection's versions 2 and 3."""
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    dataset = meta.get("dataset_meta")
    dataset = dataset if isinstance(dataset, Mapping) else {}
    for names in (content.get("class_names"), meta.get("CLASSES"), dataset.get("classes")):
        if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
            return list(names)
    return None


def load_strict(model: nn.Module, weights: WeightFile, what: str) -> None:
    """Load every weight, or raise.

    A published layout that the model knows (``own_layout``) is brought into its own.

    Tolerated: anchors and pixel statistics that old checkpoints carry (the statistics must equal
    the model's), a batch-norm counter on one side only, and the renamings that Detectron2's own
    modules do.

    Raises:
        UserError: a key is missing, unexpected or of another shape, or the pixel mean or standard
            deviation differ from the config's; they are named.
    """
    expected = model.state_dict()
    state = own_layout(model, weights.model)
    state = {k: v for k, v in state.items() if not any(x in k for x in _REBUILT)}
    for key in ("pixel_mean", "pixel_std"):
        ours = getattr(model, key, None)
        theirs = weights.model.get(key)
        if ours is None or theirs is None:
            continue
        ours, theirs = ours.flatten().float().cpu(), theirs.flatten().float()
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4):
            raise UserError(
                f"{what}: {weights.path} was trained with {key} {theirs.tolist()}, but the config "
                f"has {ours.tolist()}"
            )
    problems = [
        f"{key} has shape {tuple(value.shape)}, the model {tuple(expected[key].shape)}"
        for key, value in state.items()
        if key in expected and value.shape != expected[key].shape
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

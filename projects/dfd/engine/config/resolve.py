"""Filling in what a config leaves to the machine, the data and the defaults of functions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from ...data import class_names, registered_name
from ...distill.precision import resolve_precision
from ...errors import UserError
from ...modeling import pixel_statistics
from .parameters import signature

_PACKAGE = __name__.partition(".")[0]
# A detector's settings of the pixels that it takes.
_PIXELS = ("pixel_mean", "pixel_std", "input_format")
_PLAIN = (type(None), bool, int, float, str, tuple, list, dict)


def resolve_config(cfg: DictConfig) -> DictConfig:
    """Fill in every "auto", in place.

    Those of ``train.device``, ``train.amp.enabled``, any ``num_classes``, and of the pixels: what
    a timm model was trained on is known by its name, and the loaders follow the student.
    Afterwards the config holds plain values, as the saved ``config.yaml`` shows them.

    Raises:
        UserError: the device is not there, the data cannot be read, or pixel statistics are "auto"
            without a timm model to take them from.
    """
    cfg.train.device = device = resolve_device(cfg)
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"train.device is {device}, which torch cannot use here: use auto, cuda or cpu"
        ) from error
    if cfg.train.amp.enabled == "auto":
        # Not every device has units for bf16; every CUDA device computes in fp16.
        if cfg.train.amp.get("dtype", "bf16") == "fp16":
            cfg.train.amp.enabled = torch.device(device).type == "cuda"
        else:
            precision = resolve_precision("auto", torch.device(device))
            cfg.train.amp.enabled = precision != torch.float32
    # In the whole config: parts of the model may be references to elsewhere.
    if any(node.num_classes == "auto" for node in _nodes_with(cfg, "num_classes")):
        classes = len(class_names(registered_name(cfg.dataloader.train.dataset)))
        for node in _nodes_with(cfg, "num_classes"):
            if node.num_classes == "auto":
                node.num_classes = classes
    resolve_pixels(cfg)
    teacher = cfg.model.get("teacher")
    if teacher is not None and teacher.get("checkpoint"):
        skip_pretrained(teacher)
    return cfg


def skip_pretrained(node: DictConfig) -> None:
    """Have no timm model below a config node fetch weights that a checkpoint will replace."""
    for trunk in _timm_trunks(node):
        trunk.pretrained = False


def pretrained_trunks(node: DictConfig) -> list[str]:
    """The timm models below a config node that start from weights, in words."""
    return [
        f"{trunk.model_name}: {'timm, by name' if trunk.pretrained is True else trunk.pretrained}"
        for trunk in _timm_trunks(node)
        if trunk.pretrained
    ]


def _timm_trunks(node: DictConfig) -> list[DictConfig]:
    return [trunk for trunk in _nodes_with(node, "pretrained") if "model_name" in trunk]


def resolve_pixels(cfg: DictConfig) -> None:
    """Fill in "auto" for what a detector's pixels are like, and for the order of the loaders."""
    for part in ("backbone", "trunk"):
        for node in _nodes_with(cfg, part):
            if "auto" in (node.get(key) for key in _PIXELS):
                _take_from_timm(node, node[part])
    student = cfg.model.get("student", cfg.model)
    # What a config says beside a distilled student comes first.
    order = cfg.model.get("input_format") or student.get("input_format") or "BGR"
    for split in ("train", "test"):
        mapper = cfg.dataloader[split].get("mapper") if split in cfg.dataloader else None
        if mapper is not None and mapper.get("image_format") == "auto":
            mapper.image_format = order


def _take_from_timm(detector: DictConfig, part: DictConfig) -> None:
    """Give a detector the mean, standard deviation and order that its timm model wants."""
    names = {node.model_name for node in _nodes_with(part, "model_name")}
    if len(names) != 1:
        raise UserError(
            "pixel_mean, pixel_std or input_format is auto, but its backbone has no timm model "
            "(model_name) to take them from: give numbers and an order"
        )
    mean, std = pixel_statistics(names.pop())
    values = dict(zip(_PIXELS, (mean, std, "RGB"), strict=True))
    for key, value in values.items():
        # What the config says itself stays, a mean in the other order included: the order of both
        # is compared when the detector is made.
        if detector.get(key) == "auto":
            detector[key] = value


def resolve_device(cfg: DictConfig) -> str:
    """The device that a config's ``train.device`` means here.

    Raises:
        UserError: it is not there.
    """
    device = str(cfg.train.get("device", "auto"))
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"train.device is {device}, but torch sees no CUDA device: use auto or cpu")
    return device


def set_length(cfg: DictConfig, num_images: int | None) -> None:
    """Turn ``train.epochs``, if given, into ``train.max_iter``, in place."""
    epochs = cfg.train.epochs
    if epochs is None:
        return
    if num_images is None:
        raise UserError("train.epochs needs a dataset of known length: set train.max_iter instead")
    batch = cfg.dataloader.train.total_batch_size
    cfg.train.max_iter = max(1, math.ceil(epochs * num_images / batch))


def pin_defaults(cfg: DictConfig) -> DictConfig:
    """Write out what the config leaves to the defaults of this project's own code, in place.

    A saved config.yaml that only said ``DFDLoss()`` would mean something else, without a word,
    after an update that changes a default.
    """
    for node in list(_nodes_with(cfg, "_target_")):
        function, parameters = signature(node)
        if not getattr(function, "__module__", "").startswith(f"{_PACKAGE}."):
            continue
        for name, parameter in parameters.items():
            if name not in node and isinstance(parameter.default, _PLAIN):
                node[name] = parameter.default
    return cfg


def _nodes_with(node: Any, key: str) -> Iterator[DictConfig]:
    """Every dict below a config node that has a key of this name with a value of its own."""
    if isinstance(node, DictConfig):
        if key in node and not OmegaConf.is_interpolation(node, key):
            yield node
        children = [k for k in node if not OmegaConf.is_interpolation(node, k)]
    elif isinstance(node, ListConfig):
        children = [i for i in range(len(node)) if not OmegaConf.is_interpolation(node, i)]
    else:
        return
    for child in children:
        yield from _nodes_with(node[child], key)

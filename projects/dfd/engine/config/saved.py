"""Configs in YAML, read as data: nothing that such a file names is called while it is read.

Detectron2 reads them with ``yaml.unsafe_load``, by which a file may call anything. What its
``LazyConfig.save`` writes of plain settings, functions and classes needs no more than is here.
Written they are in their own order: in it the parts of a model are made, and draw their weights.
"""

from __future__ import annotations

import enum
import functools
import importlib
import inspect
import pathlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.config import LazyConfig, lazy
from detectron2.layers import ShapeSpec
from omegaconf import DictConfig, ListConfig, OmegaConf

_PYTHON = "tag:yaml.org,2002:python/"
# What may be called, as it does nothing but hold its arguments.
_HOLDERS: dict[str, Callable] = {
    "builtins.range": range,
    "builtins.slice": slice,
    "detectron2.layers.shape_spec.ShapeSpec": ShapeSpec,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    # Where Python keeps them depends on its version.
    **{
        f"{module}.{kind}": pathlib.Path
        for module in ("pathlib", "pathlib._local")
        for kind in ("PosixPath", "WindowsPath", "Path")
    },
}
# Where the parts of a detector and of its training are from: calling one builds it.
_PARTS = (
    *(f"dfd.{name}" for name in "distill losses modeling data demo".split()),
    *(f"dfd.engine.{name}" for name in "optim schedule".split()),
    *(f"detectron2.{name}" for name in "modeling layers structures evaluation solver".split()),
    "detectron2.engine.hooks",
    *(f"detectron2.data.{name}" for name in "transforms dataset_mapper".split()),
    *("fvcore.common.param_scheduler", "fvcore.transforms", "fvcore.nn"),
    *("torch.nn", "torch.optim", "torchvision.ops", "torchvision.models", "timm.layers"),
)
_SINGLE_PARTS = tuple(
    f"detectron2.data.build.{name}"
    for name in (
        "get_detection_dataset_dicts",
        "build_detection_train_loader",
        "build_detection_test_loader",
    )
)
_PACKAGES = ("dfd", "detectron2", "fvcore", "torch", "torchvision", "timm")


def save_config(cfg: DictConfig, path: str) -> None:
    """As Detectron2's ``LazyConfig.save``, but in the order of the config.

    That sorts keys, and a run from such a file would begin with other weights of the same seed.
    """
    whole = lazy.yaml
    in_order = functools.partial(yaml.dump, sort_keys=False)
    lazy.yaml = types.SimpleNamespace(dump=in_order, unsafe_load=yaml.unsafe_load)
    try:
        LazyConfig.save(cfg, path)
    finally:
        lazy.yaml = whole


REMEDY = "reading a run runs no code of its own: give --trust-code if it is yours"


class ForeignCodeError(ValueError):
    """A config names what must not be called or imported; nothing of it was."""

    def __init__(self, name: Any, why: str) -> None:
        super().__init__(f"it names {name}, {why}")


def read_config(path: str, *, trusted: bool) -> Any:
    """The content of a YAML config, as ``LazyConfig.load`` gives it.

    Args:
        trusted: functions and classes may be of any module. Else only parts of detectors and of
            their training are taken, of Detectron2, torch, torchvision, timm and this project.

    Raises:
        ForeignCodeError: it calls something, or names what it may not.
        OSError, yaml.YAMLError: it cannot be read.
    """
    content = _load(path, find_object if trusted else find_part)
    content = {} if content is None else content  # An empty file.
    cfg = OmegaConf.create(content, flags={"allow_objects": True})
    if not trusted:
        _check_targets(cfg)
    return cfg


def read_names(path: str) -> Any:
    """The content of a YAML config as plain containers, with names in place of what they name."""
    return _load(path, str)


def _load(path: str, find: Callable[[str], Any]) -> Any:
    with open(path, encoding="utf-8") as f:
        loader = _Loader(f)
        loader.find = find
        try:
            return loader.get_single_data()
        except RecursionError as error:
            raise ValueError("it is nested too deep") from error
        finally:
            loader.dispose()


class _Loader(yaml.SafeLoader):
    """``find`` gives what a dotted name means."""

    find: Callable[[str], Any]

    def construct_python(self, kind: str, node: yaml.Node) -> Any:
        kind, _, name = kind.partition(":")
        if kind == "tuple":
            return tuple(self.construct_sequence(node, deep=True))
        if kind == "complex":
            return complex(self.construct_scalar(node))
        if kind == "name":
            return self.find(name)
        if kind in ("object/apply", "object/new", "object"):
            return self._construct_call(name, *self._arguments(node))
        raise ForeignCodeError(f"!!python/{kind}", "which is no setting")

    def _arguments(self, node: yaml.Node) -> tuple[list, dict, Any]:
        """Positional and named arguments of a call, and the state that the result is given."""
        if isinstance(node, yaml.SequenceNode):
            return self.construct_sequence(node, deep=True), {}, None
        if not isinstance(node, yaml.MappingNode):
            return [], {}, None
        values = self.construct_mapping(node, deep=True)
        if not set(values) <= {"args", "kwds", "state", "listitems", "dictitems"}:
            return [], values, None  # !!python/object gives attributes.
        return list(values.get("args", ())), values.get("kwds", {}), values.get("state")

    def _construct_call(self, name: str, args: list, kwargs: dict, state: Any) -> Any:
        if self.find is str:
            return name
        if name in _HOLDERS:
            return _HOLDERS[name](*args, **kwargs)
        if name == "functools.partial" and state:
            function, args, kwargs, _ = state
            return functools.partial(function, *args, **kwargs)
        if name == "numpy.dtype":
            dtype = np.dtype(args[0]) if isinstance(args[0], str) else None
            if dtype is None or dtype.kind not in "biuf":
                raise ForeignCodeError(name, "of no number")
            return dtype
        if name in ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"):
            return np.frombuffer(args[1], args[0])[0].item()
        where, _, last = name.rpartition(".")
        # An enumeration is looked up among modules that are there: an import would run code.
        kind = getattr(sys.modules.get(where), last, None)
        if isinstance(kind, type) and issubclass(kind, enum.Enum) and len(args) == 1:
            return kind(args[0])
        raise ForeignCodeError(name, "which would be called by reading it")


_Loader.add_multi_constructor(_PYTHON, _Loader.construct_python)


def find_object(name: str) -> Any:
    """What a dotted name means: the object of a module, which is imported.

    Raises:
        ForeignCodeError: there is nothing of that name.
    """
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        try:
            return functools.reduce(getattr, parts[count:], found)
        except AttributeError:
            break
    raise ForeignCodeError(name, "which is not there")


def find_part(name: str) -> Any:
    """The same of parts of detectors alone; no other module is imported.

    Raises:
        ForeignCodeError: it is none.
    """
    why = "which is no part of a detector that this project knows"
    if name.partition(".")[0] not in _PACKAGES or any(p.startswith("_") for p in name.split(".")):
        raise ForeignCodeError(name, why)
    found = find_object(name)
    # What counts is where it is defined: a module also holds what it has imported.
    home = str(getattr(found, "__module__", ""))
    if not (inspect.isclass(found) or callable(found)):
        raise ForeignCodeError(name, why)
    own = f"{home}.{getattr(found, '__qualname__', '')}"
    if own in _SINGLE_PARTS or any(f"{own}.".startswith(f"{part}.") for part in _PARTS):
        return found
    in_packages = home.partition(".")[0] in _PACKAGES
    if in_packages and inspect.isclass(found) and issubclass(found, torch.nn.Module):
        return found
    raise ForeignCodeError(name, why)


def _check_targets(cfg: Any) -> None:
    """Raise unless everything that a config would call is a part of a detector."""
    # Resolved too: a resolver may make what is called.
    for resolve in (False, True):
        if isinstance(cfg, DictConfig | ListConfig):
            for node in _mappings(OmegaConf.to_container(cfg, resolve=resolve)):
                target = node.get("_target_")
                if isinstance(target, str) and not (not resolve and "${" in target):
                    find_part(target)
                elif target is not None and not isinstance(target, str | Mapping):
                    find_part(f"{target.__module__}.{target.__qualname__}")
                if node.get("proposal_files"):
                    raise ForeignCodeError("proposal_files", "pickles, which Detectron2 would run")


def _mappings(node: Any) -> Iterator[Mapping]:
    if isinstance(node, Mapping):
        yield node
        for child in node.values():
            yield from _mappings(child)
    elif isinstance(node, list | tuple):
        for child in node:
            yield from _mappings(child)

"""What the function of a LazyCall node takes as each parameter, told by its signature."""

from __future__ import annotations

import inspect
import os
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

from ...errors import UserError

# What other formats take for a bool. Hydra reads them as text, of which any is true to Python.
_SWITCH_WORDS = ("yes", "no", "on", "off", "y", "n")
# What becomes something else, or has no value yet.
_NO_WORDS = ("auto", "???")


def check_switches(cfg: DictConfig) -> None:
    """
    Raises:
        UserError: a config, written or saved, has a word where a function takes a bool. Python
            takes any for true, "no" as well.
    """
    # Plain values: OmegaConf's nodes are looked up a hundred times as slowly.
    _check_switches(cfg, OmegaConf.to_container(cfg, resolve=False), "")


def _check_switches(cfg: DictConfig, values: dict[Any, Any] | list[Any], path: str) -> None:
    call = values if isinstance(values, dict) else {}
    if "${" in str(call.get("_target_")):
        call = OmegaConf.select(cfg, path)
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict | list):
            _check_switches(cfg, value, name)
        elif isinstance(value, str) and value not in _NO_WORDS:
            kinds = parameter_kinds(call, key) or kinds_by_default(call, key)
            if is_word_for_switch(value, kinds):
                raise UserError(f"{name} is {value!r}: it must be true or false")


def is_word_for_switch(value: Any, kinds: set[str]) -> bool:
    """Whether what takes a bool is given text, ``no`` above all, which would switch it on."""
    if not isinstance(value, str) or "${" in value:
        return False
    if "bool" not in kinds or "text" in kinds:
        return False
    return kinds <= {"bool", "none", "number"} or value.lower() in _SWITCH_WORDS


def parameter_kinds(node: Mapping[str, Any], name: str) -> set[str]:
    """What the function of a LazyCall node takes as a parameter; empty: it does not tell."""
    function, parameters = signature(node)
    parameter = parameters.get(name)
    if parameter is None or parameter.annotation is parameter.empty:
        return set()
    annotation = parameter.annotation
    try:
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
        annotation = hints[name]
    except Exception:  # Another parameter's is of what only type checkers import.
        pass
    # Many a "str" is None by default.
    return _kinds(annotation) | ({"none"} if parameter.default is None else set())


def kinds_by_default(node: Mapping[str, Any], name: str) -> set[str]:
    """What a parameter takes that tells no type: a bool at least if it is one by default."""
    parameter = signature(node)[1].get(name)
    return {"bool", "any"} if parameter and isinstance(parameter.default, bool) else set()


def target_of(node: Any) -> Any:
    """The function or class of a LazyCall node; None: it is no call, or of what is not there."""
    target = node.get("_target_") if isinstance(node, Mapping) else None
    try:
        # A config that a run saved holds names.
        return locate(target) if isinstance(target, str) else target
    except Exception:  # Told, with the place in the config, when it is built.
        return None


def signature(node: Any) -> tuple[Any, Mapping[str, inspect.Parameter]]:
    """The function of a LazyCall node and its parameters, none where they cannot be told."""
    function = target_of(node)
    try:
        return function, inspect.signature(function).parameters
    except Exception:  # No function, or a builtin without a signature.
        return None, {}


def _kinds(annotation: Any) -> set[str]:
    """What an annotation permits, out of "text", "none", "bool", "number", "any", "other"."""
    if isinstance(annotation, str):  # One that cannot be resolved.
        annotation = re.sub(r"(?:typing\.)?Optional\[([\w.]+)\]", r"\1 | None", annotation)
        names = {"str": "text", "None": "none", "bool": "bool", "int": "number", "float": "number"}
        return {names.get(part.strip(), "other") for part in annotation.split("|")}
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return set().union(*map(_kinds, typing.get_args(annotation)))
    if origin is typing.Literal:
        return set().union(*(_kinds(type(value)) for value in typing.get_args(annotation)))
    if annotation in (Any, object):
        return {"any"}
    kind = origin or annotation
    if not isinstance(kind, type):
        return {"other"}
    if issubclass(kind, str | os.PathLike):
        return {"text"}
    if issubclass(kind, bool | types.NoneType):
        return {"bool" if issubclass(kind, bool) else "none"}
    return {"number" if issubclass(kind, int | float) else "other"}

"""Datasets that a config registers at its top: the same again is no error when it is read again.

A config is a program that runs each time it is read: by every config that imports it, and again in
the processes of one run. Detectron2's catalogs refuse a name that they know.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple
from unittest import mock

from detectron2.data import DatasetCatalog
from detectron2.data.catalog import Metadata

# Detectron2's name for the package of a config that it runs.
_CONFIG_PACKAGE = "detectron2._cfg_loader"


class _Source(NamedTuple):
    """A config file, and one of the times that it was run: its variables."""

    file: str
    variables: dict[str, Any]


# Who registered a dataset, by its name, and who set an attribute, by dataset and attribute.
_registered: dict[str, _Source] = {}
_attributes: dict[tuple[str, str], _Source] = {}


@contextlib.contextmanager
def repeatable_registrations() -> Iterator[None]:
    """Within the context, a config may register what it, or one like it, has registered before.

    What another config registers under a known name must be the same, or Detectron2's assertion
    is raised; so it is if a config registers a name twice in one run.
    """
    catalog = type(DatasetCatalog)
    register, set_attribute = catalog.register, Metadata.__setattr__

    def register_again(self: Any, name: str, func: Callable) -> None:
        source = _running_config()
        if source is not None and name in self:
            before = _registered.get(name)
            if _ran_again(before, source):
                del self[name]
            elif (before is None or before.variables is not source.variables) and _same(
                self[name], func
            ):
                return
            elif before is not None:
                raise AssertionError(
                    f"dataset {name!r} is already registered by {before.file} as something else: "
                    "choose another name"
                )
        register(self, name, func)
        if source is not None:
            _registered[name] = source

    def set_again(self: Any, key: str, value: Any) -> None:
        source = _running_config()
        place = (self.name, key)
        if source is not None and key in self.__dict__:
            if _ran_again(_attributes.get(place), source):
                del self.__dict__[key]
            elif _same(self.__dict__[key], value):
                return
        set_attribute(self, key, value)
        if source is not None:
            _attributes[place] = source

    with (
        mock.patch.object(catalog, "register", register_again),
        mock.patch.object(Metadata, "__setattr__", set_again),
    ):
        yield


def _running_config() -> _Source | None:
    """The config file whose code, or code that it calls, is being run; None: no config's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        variables = frame.f_globals
        if str(variables.get("__package__") or "").startswith(_CONFIG_PACKAGE):
            return _Source(os.path.realpath(variables["__file__"]), variables)
        frame = frame.f_back
    return None


def _ran_again(before: _Source | None, now: _Source) -> bool:
    return (
        before is not None and before.file == now.file and before.variables is not now.variables
    )


def _same(one: Any, other: Any, depth: int = 0) -> bool:
    """Whether two values are equal, or two functions do the same with the same."""
    if one is other:
        return True
    if depth > 8 or type(one) is not type(other):
        return False
    if isinstance(one, FunctionType):
        return _same(_meaning(one), _meaning(other), depth + 1)
    if isinstance(one, CodeType):
        # Where it was written does not count.
        parts = ("co_code", "co_consts", "co_names", "co_varnames", "co_freevars")
        return all(_same(getattr(one, p), getattr(other, p), depth + 1) for p in parts)
    if isinstance(one, list | tuple):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(_same(a, b, depth + 1) for a, b in pairs)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k], depth + 1) for k in one)
    if hasattr(one, "func") and hasattr(one, "keywords"):  # A partial.
        pairs = ((getattr(v, "func", None), v.args, v.keywords) for v in (one, other))
        return _same(*pairs, depth + 1)
    try:
        return bool(one == other)
    except Exception:  # Arrays do not compare as one.
        return False


def _meaning(function: FunctionType) -> tuple:
    """What a function's result depends on."""
    names = function.__code__.co_names
    return (
        function.__code__,
        function.__defaults__,
        function.__kwdefaults__,
        [cell.cell_contents for cell in function.__closure__ or ()],
        {name: function.__globals__[name] for name in names if name in function.__globals__},
    )

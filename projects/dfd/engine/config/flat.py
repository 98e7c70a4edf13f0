"""Settings of a config as plain text by their keys, so that two runs can be compared.

What a config leaves to the default of a function counts like what it says itself, and functions
and classes go by their public names: neither a parameter that is new, nor a function that has
moved, makes another run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .names import public_name, same_thing
from .parameters import signature, target_of

_PLAIN = (type(None), bool, int, float, str)
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_<]\w*>?)+")


@dataclass(frozen=True)
class FlatSettings:
    """``texts`` by key, and the keys of those that are what the functions have by default."""

    texts: dict[str, str]
    defaults: frozenset[str]


def flat_settings(
    parts: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    *,
    of_functions: bool = True,
) -> FlatSettings:
    """Every setting of a config's parts, those left to the defaults of functions included.

    Args:
        parts: plain containers without references, by the name of the part.
        defaults: of what belongs to no function, in the same form.
        of_functions: False: only what the parts say, where both sides leave as much unsaid.
    """
    known = dict(_leaves(defaults or {}, ""))
    leaves = dict(_leaves(parts, ""))
    at_default = {key for key, value in leaves.items() if key in known and value == known[key]}
    for key, node in _calls(parts, "") if of_functions else ():
        for name, default in _default_arguments(node):
            own = dict(_leaves(default, f"{key}.{name}"))
            there = dict(_leaves(node[name], f"{key}.{name}")) if name in node else own
            leaves.update(there)
            if there == own:
                at_default.update(own)
    return FlatSettings({key: _text(value) for key, value in leaves.items()}, frozenset(at_default))


def differing(before: FlatSettings, now: FlatSettings) -> list[str]:
    """The keys of what is not the same; what only one side has counts unless it is a default."""
    keys = []
    for key in {**before.texts, **now.texts}:
        if key in before.texts and key in now.texts:
            same = _equal(before.texts[key], now.texts[key])
        else:
            same = key in (now if key in now.texts else before).defaults
        if not same:
            keys.append(key)
    return keys


def _equal(before: str, now: str) -> bool:
    if before == now:
        return True
    if _NAME.fullmatch(before) and _NAME.fullmatch(now):
        return same_thing(before, now)
    try:
        return float(before) == float(now)
    except ValueError:
        return False


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping | list | tuple):
        items = node.items() if isinstance(node, Mapping) else enumerate(node)
        for name, child in items:
            yield from _leaves(child, f"{key}.{name}" if key else str(name))
        return
    if key.endswith("_target_") and isinstance(node, str):
        node = target_of({"_target_": node}) or node
    yield key, node


def _text(value: Any) -> str:
    return str(value) if isinstance(value, _PLAIN) else public_name(value)


def _calls(node: Any, key: str) -> Iterator[tuple[str, Mapping]]:
    """Every node that describes a call, with its key."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield key, node
        items = node.items()
    elif isinstance(node, list | tuple):
        items = enumerate(node)
    else:
        return
    for name, child in items:
        yield from _calls(child, f"{key}.{name}" if key else str(name))


def _default_arguments(node: Mapping) -> Iterator[tuple[str, Any]]:
    """The parameters of a call's function that have a default in plain values."""
    for name, parameter in signature(node)[1].items():
        if _is_plain(parameter.default):
            yield name, parameter.default


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)

"""``key=value`` arguments: text as it is where the key takes text, Hydra's grammar elsewhere.

A path may hold blanks, brackets, quotes, ``=`` and ``~``, be called 2007, and is no program: only
what the key takes tells it from a number, a list or a call.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from detectron2.config import LazyConfig
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from ...errors import UserError, first_line
from .grammar import parse_override, split_override
from .parameters import is_word_for_switch, kinds_by_default, parameter_kinds, signature, target_of
from .schema import TEXT_OF_A_RUN

_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


def apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Apply ``key=value`` overrides one by one, each checked against what those before have made.

    Raises:
        UserError: one cannot be read or applied, or names no known key.
    """
    for text in overrides:
        if text.startswith("-"):
            raise UserError(f"{text} stands among the overrides: flags go before them")
        cfg = _apply(cfg, text)
    return cfg


def _apply(cfg: DictConfig, text: str) -> DictConfig:
    prefix, key, value = split_override(text)
    shown = text if text.isprintable() else repr(text)
    if prefix == "~":
        raise UserError(f"override {shown}: a key cannot be deleted: set it to null")
    if key is None:
        raise UserError(f"an override cannot be read, it must be key=value: {shown}")
    if prefix != "+":
        check_key(cfg, key)
    kinds, there = _takes(cfg, key)
    try:
        if not (kinds and kinds <= {"text", "none"}) or _is_call(value, there):
            parsed = parse_override(text)
            if not ("text" in kinds and _is_other(parsed, kinds)):
                if parsed.is_sweep_override():
                    raise UserError(
                        f"override {shown}: that is several values, and a run has one: write a "
                        "list as [a,b]"
                    )
                if is_word_for_switch(parsed.value(), kinds):
                    raise UserError(f"override {shown}: it must be true or false")
                if prefix != "+" and _is_another_call(parsed.value(), there):
                    return _replace_call(cfg, key, parsed.value(), there)
                return LazyConfig.apply_overrides(cfg, [text])
    except (KeyError, OmegaConfBaseException) as error:
        raise UserError(f"override {shown} cannot be applied: {first_line(error)}") from error
    except UserError:
        raise
    except Exception as error:  # Hydra's parser speaks of tokens.
        if "text" not in kinds:
            raise UserError(
                f"override {shown}: its value cannot be read: close its brackets and quotes, and "
                f"quote text that is no plain word, {prefix}{key}=\"'...'\""
            ) from error
    content = None if value == "null" and "none" in kinds else unquoted(value)
    try:
        OmegaConf.update(cfg, key, content, merge=True)
    except GrammarParseError as error:
        raise UserError(
            f"override {shown}: ${{ begins a reference to another key, ${{key}}: write \\${{ where "
            "it is text"
        ) from error
    except (TypeError, KeyError, OmegaConfBaseException) as error:
        raise UserError(f"override {shown} cannot be applied: {first_line(error)}") from error
    return cfg


def unquoted(value: str) -> str:
    """The value without quotes of Hydra's that enclose all of it."""
    if not _QUOTED.fullmatch(value):
        return value
    return parse_override(f"key={value}").value()


def _is_call(value: str, there: Any) -> bool:
    """Whether a value is no text, but a call in its place (``{_target_: ...}``) or a part of it."""
    if not value.startswith("{"):
        return False
    try:
        read = parse_override(f"key={value}").value()
    except Exception:
        return False
    return isinstance(read, dict) and ("_target_" in read or isinstance(there, DictConfig))


def _is_another_call(value: Any, there: Any) -> bool:
    """Whether a value calls another function than the call in its place does."""
    if not (isinstance(value, dict) and "_target_" in value and isinstance(there, DictConfig)):
        return False
    # By its name what is not there, which is told where it is called.
    ours, theirs = (target_of(node) or node.get("_target_") for node in (value, there))
    return ours != theirs


def _replace_call(cfg: DictConfig, key: str, value: Any, there: DictConfig) -> DictConfig:
    """Put another call in the place of one, which merged would take over settings of that.

    Only what a config joins itself by stays, a call or a reference such as the parameters of an
    optimizer or the dataset of an evaluator, where the new function has a parameter for it.
    """
    kept = {
        name: node
        for name, node in OmegaConf.to_container(there, resolve=False).items()
        if name not in value
        and (OmegaConf.is_interpolation(there, name) or "_target_" in str(node))
        and name != "_target_"
    }
    OmegaConf.update(cfg, key, value, merge=False)
    node = OmegaConf.select(cfg, key)
    for name, content in kept.items():
        if _accepts(node, name):
            node[name] = content
    return cfg


def _is_other(parsed: Override, kinds: set[str]) -> bool:
    """Whether Hydra's grammar reads what a key that takes text does not take."""
    if parsed.is_sweep_override():
        return True
    value = parsed.value()
    kind = "bool" if isinstance(value, bool) else "number"
    return isinstance(value, bool | int | float) and not kinds & {kind, "any"}


def _takes(cfg: DictConfig, key: str) -> tuple[set[str], Any]:
    """What a key takes, as ``parameter_kinds`` tells it, and what the config has there.

    The signature of the function decides, else what is there; empty: neither tells.
    """
    if key in TEXT_OF_A_RUN:  # Though no signature says so.
        return {"text", "none"} if TEXT_OF_A_RUN[key] else {"text"}, None
    parent, _, name = key.rpartition(".")
    try:
        node = OmegaConf.select(cfg, parent) if parent else cfg
        there = OmegaConf.select(cfg, key)
    except OmegaConfBaseException:  # It refers to what is not there.
        return set(), None
    call = node if isinstance(node, DictConfig) else OmegaConf.create()
    if kinds := parameter_kinds(call, name):
        return kinds, there
    # What is "auto" becomes something else.
    if isinstance(there, str) and there != "auto":
        return {"text", "none"}, there
    if isinstance(there, bool):
        return {"bool", "any"}, there  # It may be other things too.
    return kinds_by_default(call, name), there


def check_key(cfg: DictConfig, key: str) -> None:
    """Raise a UserError unless a config has a key, or its function a parameter of the name."""
    node: Any = cfg
    parts = key.split(".")
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth]) or "the config"
        if isinstance(node, ListConfig) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
            continue
        if isinstance(node, DictConfig) and part in node:
            if depth < len(parts) - 1 and OmegaConf.is_interpolation(node, part):
                # Setting something below would replace the reference, not what it refers to.
                source = OmegaConf.to_container(node, resolve=False)[part]
                here, below = ".".join(parts[: depth + 1]), ".".join(parts[depth + 1 :])
                raise UserError(
                    f"override {key}: {here} is {source}: override {source[2:-1]}.{below} instead"
                )
            node = None if OmegaConf.is_missing(node, part) else node[part]
            continue
        if isinstance(node, DictConfig) and depth == len(parts) - 1 and _accepts(node, part):
            return
        keys = node if isinstance(node, DictConfig) else ()
        known = ", ".join(str(k) for k in keys if k != "_target_") or "nothing"
        raise UserError(
            f"override {key}: {where} has no {part!r} (it has {known}); "
            f"write +{key}=... to add a new key"
        )


def _accepts(node: DictConfig, name: str) -> bool:
    """Whether a LazyCall node's function has a parameter of this name, or may have."""
    if node.get("_target_") is None:
        return False
    function, parameters = signature(node)
    return function is None or name in parameters

"""The text of ``key=value`` arguments, written and read: Hydra's grammar."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString

# What needs no quotes, if it is not read as a number or the like.
_PLAIN = re.compile(r"[\w./-]+|\$\{[\w.]+\}", re.ASCII)
_WORDS = {"None": "null", "True": "true", "False": "false"}


def override(key: str, value: Any) -> str:
    """A ``key=value`` argument that Hydra's grammar reads as this very value.

    In a string ``${...}`` refers to another key; a path (``pathlib``) is nothing but its name.
    """
    if isinstance(value, PurePath):
        # As OmegaConf reads it: backslashes before a reference count as halves.
        value = re.sub(r"(\\*)\$\{", r"\1\1\\${", str(value))
    return f"{key}={_hydra_text(value)}"


def _hydra_text(value: Any) -> str:
    if isinstance(value, str):
        if _PLAIN.fullmatch(value) and parse_override(f"key={value}").value() == value:
            return value
        return QuotedString(value, Quote.single).with_quotes()
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_hydra_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_hydra_text, value)) + "]"
    return _WORDS.get(repr(value), repr(value))


def split_override(text: str) -> tuple[str, str | None, str]:
    """A ``key=value`` argument as its prefix (``+``, ``++``, ``~`` or none), key and value.

    The key is None if it has none.
    """
    found = re.fullmatch(r"(\+\+|\+|~)?([^=]+)=(.*)", text, re.DOTALL)
    if found is None:
        return text[:1] if text.startswith("~") else "", None, ""
    return found[1] or "", found[2], found[3]


def parse_override(text: str) -> Override:
    """Hydra's reading of a ``key=value`` argument; its own errors pass."""
    return OverridesParser.create().parse_override(text)

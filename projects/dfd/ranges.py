"""What settings may be: anything else is refused in one line that names the setting."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from .errors import UserError


def check_number(name: str, value: Any, least: float = 0.0, most: float = math.inf) -> float:
    if not is_number(value) or not least <= value <= most:
        bounds = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise UserError(f"{name} is {value!r}; it must be a number {bounds}")
    return float(value)


def check_positive(name: str, value: Any) -> float:
    if not is_number(value) or value <= 0:
        raise UserError(f"{name} is {value!r}; it must be a number above 0")
    return float(value)


def check_probability(name: str, value: Any) -> float:
    return check_number(name, value, 0, 1)


def check_range(name: str, value: Any) -> tuple[float, float]:
    """Two positive numbers, the smaller one first."""
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if len(values) != 2 or not all(map(is_number, values)) or not 0 < values[0] <= values[1]:
        raise UserError(f"{name} is {value!r}; it must be two numbers above 0, the smaller first")
    return float(values[0]), float(values[1])


def check_count(name: str, value: Any, least: int) -> int:
    if not is_integer(value) or value < least:
        raise UserError(f"{name} is {value!r}; it must be an integer of at least {least}")
    return int(value)


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
    return value


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

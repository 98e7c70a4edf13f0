"""Settings of a mosaic: what they may be, and those that follow the length of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import UserError

_STRIDE = 32


def closing_batch(*, max_iter: int, closing: float = 15 / 300, accumulation_steps: int = 1) -> int:
    """The number of the first batch of a run's closing part, for configs.

    With gradient accumulation a loader's batches are more than the run's iterations.

    Args:
        max_iter: iterations of the run.
        closing: its closing part, as a share of it. YOLOX's is 15 of 300 epochs (its own code
            begins one epoch earlier than its paper and its learning rate say).
        accumulation_steps: batches per iteration.

    Raises:
        UserError: the share is not from 0 to 1.
    """
    check_probability("closing_batch: closing", closing)
    return round(max_iter * (1 - closing)) * accumulation_steps


def in_batches(*, iterations: int, accumulation_steps: int = 1) -> int:
    """A loader's batches in so many iterations of a run, for configs."""
    return iterations * accumulation_steps


def check_number(name: str, value: Any, least: float = 0.0, most: float = math.inf) -> float:
    if not _is_number(value) or not least <= value <= most:
        bounds = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise UserError(f"{name} is {value!r}; it must be a number {bounds}")
    return float(value)


def check_probability(name: str, value: Any) -> float:
    return check_number(name, value, 0, 1)


def check_range(name: str, value: Any) -> tuple[float, float]:
    """Two positive numbers, the smaller one first."""
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if len(values) != 2 or not all(map(_is_number, values)) or not 0 < values[0] <= values[1]:
        raise UserError(f"{name} is {value!r}; it must be two numbers above 0, the smaller first")
    return float(values[0]), float(values[1])


def check_gains(name: str, value: Any) -> tuple[float, ...]:
    """Three numbers of at least 0."""
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if len(values) != 3 or not all(_is_number(v) and 0 <= v <= 255 for v in values):
        raise UserError(f"{name} is {value!r}; it must be three numbers from 0 to 255")
    return tuple(map(float, values))


def check_size(name: str, value: Any) -> int:
    if not _is_integer(value) or value < _STRIDE or value % _STRIDE:
        raise UserError(f"{name} is {value!r}; it must be a multiple of {_STRIDE}, in pixels")
    return int(value)


def check_sizes(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not len(value):
        raise UserError(f"{name} is {value!r}; it must be a list of multiples of {_STRIDE}")
    return tuple(check_size(f"one of {name}", side) for side in value)


def check_count(name: str, value: Any, least: int) -> int:
    if not _is_integer(value) or value < least:
        raise UserError(f"{name} is {value!r}; it must be an integer of at least {least}")
    return int(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

"""Settings of a mosaic: what they may be, and those that follow the length of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import UserError
from ...ranges import check_probability, is_integer, is_number

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


def check_gains(name: str, value: Any) -> tuple[float, ...]:
    """Three numbers from 0 to 255."""
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if len(values) != 3 or not all(is_number(v) and 0 <= v <= 255 for v in values):
        raise UserError(f"{name} is {value!r}; it must be three numbers from 0 to 255")
    return tuple(map(float, values))


def check_size(name: str, value: Any) -> int:
    if not is_integer(value) or value < _STRIDE or value % _STRIDE:
        raise UserError(f"{name} is {value!r}; it must be a multiple of {_STRIDE}, in pixels")
    return int(value)


def check_sizes(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not len(value):
        raise UserError(f"{name} is {value!r}; it must be a list of multiples of {_STRIDE}")
    return tuple(check_size(f"one of {name}", side) for side in value)

"""Single numbers, whatever they were given as."""

from __future__ import annotations

import math
import re
from typing import Any

NUMBERS = frozenset((int, float))

_WHOLE = re.compile(r"[+-]?[0-9]{1,40}(\.0*)?")


def plain(value: Any) -> Any:
    """A scalar or array of numpy or torch as Python's own numbers or lists; others as they are."""
    return value.tolist() if hasattr(value, "tolist") else value


def as_number(value: Any) -> float | None:
    """The float that a number or a text is, perhaps not finite; None if it is neither."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and "_" in value:  # Which Python's float allows.
        return None
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def as_whole(value: Any) -> int | None:
    """The integer that a number or a text is; None if it is none."""
    value = plain(value)
    if isinstance(value, str):
        text = value.strip()
        return int(text.partition(".")[0]) if _WHOLE.fullmatch(text) else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None

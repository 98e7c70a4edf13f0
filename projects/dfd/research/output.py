"""What results are written and shown with: numbers for people, plain data for json, figures."""

from __future__ import annotations

import io
import math
from typing import Any

from matplotlib.figure import Figure

NO_VALUE = "–"


def number(value: float | None, spec: str) -> str:
    """A number by a format; ``NO_VALUE`` where there is none."""
    return NO_VALUE if value is None or math.isnan(value) else format(value, spec)


def without_nan(node: Any) -> Any:
    """The same with None for what is not finite, which json does not have."""
    if isinstance(node, dict):
        return {key: without_nan(value) for key, value in node.items()}
    if isinstance(node, list):
        return [without_nan(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()

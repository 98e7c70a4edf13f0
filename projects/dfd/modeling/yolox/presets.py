"""The published YOLOX models by name."""

from __future__ import annotations

from typing import Any

from ...errors import UserError
from .detector import YOLOX

PRESETS: dict[str, dict[str, Any]] = {
    "nano": {"depth": 0.33, "width": 0.25, "depthwise": True},
    "tiny": {"depth": 0.33, "width": 0.375},
    "s": {"depth": 0.33, "width": 0.5},
    "m": {"depth": 0.67, "width": 0.75},
    "l": {"depth": 1.0, "width": 1.0},
    "x": {"depth": 1.33, "width": 1.25},
}


def named_yolox(name: str, *, num_classes: int, **settings: Any) -> YOLOX:
    """YOLOX-nano, -tiny, -s, -m, -l or -x.

    Args:
        name: "nano", "tiny", "s", "m", "l" or "x".
        num_classes: 80 for the published weights.
        settings: the others of :class:`YOLOX`.

    Raises:
        UserError: no such name, or a setting outside its range.
    """
    if name not in PRESETS:
        raise UserError(f"YOLOX: there is no model {name!r}; there are {', '.join(PRESETS)}")
    return YOLOX(**{**PRESETS[name], "num_classes": num_classes, **settings})

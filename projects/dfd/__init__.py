"""Disparity Feature Distillation for Detectron2 detectors."""

import importlib
from typing import Any

from .errors import UserError

__all__ = [
    "DFDHead",
    "DistilledDetector",
    "FrozenBackbone",
    "FrozenTeacher",
    "PredictionHead",
    "UserError",
]

_HOMES = {
    "DFDHead": "head",
    "DistilledDetector": "detector",
    "FrozenBackbone": "backbone_teacher",
    "FrozenTeacher": "teacher",
    "PredictionHead": "predictions",
}


def __getattr__(name: str) -> Any:
    """Imported once it is asked for, so that ``dfd --help`` waits for no torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(f".distill.{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

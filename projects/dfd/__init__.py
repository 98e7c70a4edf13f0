"""Disparity Feature Distillation for Detectron2 detectors."""

from .distiller import DistilledDetector
from .errors import UserError
from .head import DFDHead
from .teacher import FrozenTeacher

__all__ = ["DFDHead", "DistilledDetector", "FrozenTeacher", "UserError"]

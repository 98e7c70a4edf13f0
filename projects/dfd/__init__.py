"""Disparity Feature Distillation for Detectron2 detectors."""

from .distill.detector import DistilledDetector
from .distill.head import DFDHead
from .distill.teacher import FrozenTeacher
from .errors import UserError

__all__ = ["DFDHead", "DistilledDetector", "FrozenTeacher", "UserError"]

"""Hooks of the training loop beside Detectron2's own."""

from .averaged import StudentEMA, UpdateEMA
from .best import Best, BestCheckpoint, EarlyStop
from .evaluation import Evaluation, ValidationLoss
from .run_files import Checkpoints, DisparityImages, RunSummary
from .settings import check_hooks

__all__ = [
    "Best",
    "BestCheckpoint",
    "Checkpoints",
    "DisparityImages",
    "EarlyStop",
    "Evaluation",
    "RunSummary",
    "StudentEMA",
    "UpdateEMA",
    "ValidationLoss",
    "check_hooks",
]

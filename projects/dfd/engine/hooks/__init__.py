"""Hooks of the training loop beside Detectron2's own."""

from .best import Best, BestCheckpoint, EarlyStop
from .ema import StudentEMA, UpdateEMA
from .evaluation import Evaluation, ValidationLoss
from .run_files import Checkpoints, DisparityImages, RunSummary

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
]

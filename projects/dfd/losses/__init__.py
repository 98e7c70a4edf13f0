"""Criteria: one a file, each a loss between one level of two pyramids; and those of heads."""

from .base import FeatureCriterion, LevelFeatures
from .cwd import CWDLoss
from .dfd import DFDLoss
from .fgd import FGDLoss
from .g2sd import G2SDLoss
from .mgd import MGDLoss
from .mimic import MimicLoss
from .pkd import PKDLoss
from .predictions import BoxMimicLoss, ObjectnessLoss, PredictionLoss, PredictionMimicLoss

__all__ = [
    "BoxMimicLoss",
    "CWDLoss",
    "DFDLoss",
    "FGDLoss",
    "FeatureCriterion",
    "G2SDLoss",
    "LevelFeatures",
    "MGDLoss",
    "MimicLoss",
    "ObjectnessLoss",
    "PKDLoss",
    "PredictionLoss",
    "PredictionMimicLoss",
]

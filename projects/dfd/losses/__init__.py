"""Criteria: one a file, each a loss between one level of two pyramids."""

from .base import FeatureCriterion, LevelFeatures
from .cwd import CWDLoss
from .dfd import DFDLoss
from .fgd import FGDLoss
from .g2sd import G2SDLoss
from .mgd import MGDLoss
from .mimic import MimicLoss
from .pkd import PKDLoss

__all__ = [
    "CWDLoss",
    "DFDLoss",
    "FGDLoss",
    "FeatureCriterion",
    "G2SDLoss",
    "LevelFeatures",
    "MGDLoss",
    "MimicLoss",
    "PKDLoss",
]

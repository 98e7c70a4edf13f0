from .base import FeatureCriterion
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
    "MGDLoss",
    "MimicLoss",
    "PKDLoss",
]

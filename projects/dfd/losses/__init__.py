from .base import FeatureCriterion
from .dfd import DFDLoss

__all__ = ["DFDLoss", "FeatureCriterion"]

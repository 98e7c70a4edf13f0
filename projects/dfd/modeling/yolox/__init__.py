"""YOLOX: network, SimOTA, losses and detections."""

from .assign import Matches, simota
from .detector import YOLOX
from .head import Stems
from .presets import PRESETS, named_yolox

__all__ = ["PRESETS", "YOLOX", "Matches", "Stems", "named_yolox", "simota"]

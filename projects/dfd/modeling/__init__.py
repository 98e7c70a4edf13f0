"""Backbones and detectors that Detectron2 lacks."""

from .norms import layer_norm
from .simple_pyramid import SimplePyramid
from .timm_pyramid import TimmPyramid
from .timm_vit import TimmViT
from .timm_weights import pixel_statistics
from .yolox import YOLOX, named_yolox

__all__ = [
    "SimplePyramid",
    "TimmPyramid",
    "TimmViT",
    "YOLOX",
    "layer_norm",
    "named_yolox",
    "pixel_statistics",
]

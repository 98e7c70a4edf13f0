"""Backbones and detectors that Detectron2 lacks."""

from .norms import layer_norm
from .reppoints import P6P7, DeformConvBlock, RepPoints, RepPointsHead
from .simple_pyramid import SimplePyramid
from .timm_pyramid import TimmPyramid
from .timm_vit import TimmViT
from .timm_weights import pixel_statistics
from .yolox import YOLOX, named_yolox

__all__ = [
    "YOLOX",
    "DeformConvBlock",
    "P6P7",
    "RepPoints",
    "RepPointsHead",
    "SimplePyramid",
    "TimmPyramid",
    "TimmViT",
    "layer_norm",
    "named_yolox",
    "pixel_statistics",
]

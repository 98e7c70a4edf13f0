"""Backbones that Detectron2 lacks."""

from .norms import layer_norm
from .simple_pyramid import SimplePyramid
from .timm_pyramid import TimmPyramid
from .timm_vit import TimmViT
from .timm_weights import pixel_statistics

__all__ = ["SimplePyramid", "TimmPyramid", "TimmViT", "layer_norm", "pixel_statistics"]

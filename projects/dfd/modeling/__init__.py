"""Backbones that Detectron2 lacks."""

from .simple_pyramid import SimplePyramid
from .timm_vit import TimmViT
from .timm_weights import pixel_statistics

__all__ = ["SimplePyramid", "TimmViT", "pixel_statistics"]

"""The generated dataset of the demonstration."""

from .drawing import SHAPE_CLASSES
from .shapes import generated_shapes

__all__ = ["SHAPE_CLASSES", "generated_shapes"]

"""RepPoints (Yang et al., ICCV 2019): an object as nine points, a detector without anchors."""

from .assign import assign_boxes, assign_points
from .deform import DeformConv, DeformConvBlock
from .detector import RepPoints
from .head import RepPointsHead
from .points import points_to_boxes
from .pyramid import P6P7
from .weights import convert_weights

__all__ = [
    "DeformConv",
    "DeformConvBlock",
    "P6P7",
    "RepPoints",
    "RepPointsHead",
    "assign_boxes",
    "assign_points",
    "convert_weights",
    "points_to_boxes",
]

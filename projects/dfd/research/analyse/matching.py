"""Boxes on an image and the cells inside them: pure functions.

Boxes are (M,4) XYXY in pixels of the network's input unless something else is said.
"""

from __future__ import annotations

import numpy as np
import torch
from detectron2.structures import Boxes, pairwise_ioa, pairwise_iou

# COCO's, by the area of the box.
SIZES = ("small", "medium", "large")
_SIZE_BOUNDS = (32**2, 96**2)

UNMATCHED, IGNORED = -1, -2


def size_classes(boxes: np.ndarray) -> np.ndarray:
    """(M,) index into ``SIZES``: an area of 32^2 is medium, one of 96^2 large."""
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return np.digitize(areas, _SIZE_BOUNDS)


def cells_inside(boxes: np.ndarray, *, stride: int, rows: int, columns: int) -> np.ndarray:
    """(M, rows, columns) bool: the cells of a level whose centre lies in a box."""
    x = (np.arange(columns) + 0.5) * stride
    y = (np.arange(rows) + 0.5) * stride
    in_columns = (boxes[:, 0, None] <= x) & (x < boxes[:, 2, None])
    in_rows = (boxes[:, 1, None] <= y) & (y < boxes[:, 3, None])
    return in_rows[:, :, None] & in_columns[:, None, :]


def owners(boxes: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(rows, columns): the index of the smallest box that a cell lies in, -1 where there is none.

    Args:
        inside: (M, rows, columns), see ``cells_inside``.
    """
    owner = np.full(inside.shape[1:], -1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    for index in np.argsort(-areas, kind="stable"):
        owner[inside[index]] = index
    return owner


def match_detections(
    *,
    detections: np.ndarray,
    classes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    label_classes: np.ndarray,
    crowds: np.ndarray,
    crowd_classes: np.ndarray,
    iou: float,
) -> np.ndarray:
    """Give each detection, the surest first, the label of its class that it overlaps most.

    A label is given once. A detection without one that lies in a crowd of its class is neither
    right nor wrong. This is the matching of pycocotools' ``COCOeval``, which wants two indexed
    datasets for it.

    Args:
        detections, labels, crowds: (D,4), (M,4), (K,4), in the same pixels.
        iou: what they must at least overlap by: intersection over union; over the detection for
            crowds.

    Returns:
        (D,): the index of the label, ``UNMATCHED`` or ``IGNORED``.
    """
    found, truth, ignored = (Boxes(torch.from_numpy(b)) for b in (detections, labels, crowds))
    overlaps = pairwise_iou(found, truth).numpy()
    overlaps = np.where(classes[:, None] == label_classes, overlaps, 0.0)
    in_crowd = pairwise_ioa(ignored, found).numpy().T
    in_crowd = ((in_crowd >= iou) & (classes[:, None] == crowd_classes)).any(axis=1)
    result = np.where(in_crowd, IGNORED, UNMATCHED)
    for index in np.argsort(-scores, kind="stable"):
        best = int(overlaps[index].argmax()) if len(labels) else 0
        if len(labels) and overlaps[index, best] >= iou:
            result[index] = best
            overlaps[:, best] = 0.0
    return result

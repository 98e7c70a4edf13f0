"""Detections drawn on their image."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from detectron2.utils.visualizer import Visualizer
from PIL import Image

# Longest side of a picture in pixels: small images are enlarged until a label can be read.
_SMALL, _LARGE = 360, 800
_LONGEST = 65500  # That a JPEG may have.
# Distinct on light and dark images; repeated for more classes.
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324")


@dataclass(frozen=True)
class Boxes:
    """Boxes on one image: (M,4) XYXY pixels of the original image, class ids, scores or None."""

    boxes: np.ndarray
    classes: list[int]
    scores: list[float] | None = None


def draw_boxes(
    image: np.ndarray, boxes: Boxes, classes: Sequence[str], *, largest: int | None = _LARGE
) -> bytes:
    """A JPEG of an image with boxes, class names and scores; small images are enlarged.

    Args:
        image: (height, width, 3) uint8, RGB.
        largest: longest side of the picture, in pixels; None: that of the image.

    Raises:
        ValueError: no JPEG is that large.
    """
    longest = max(image.shape[:2])
    large = largest is not None and longest > largest
    if longest > _LONGEST and not large:
        raise ValueError(f"a side of {longest} pixels; a JPEG has at most {_LONGEST}")
    scale = largest / longest if large else math.ceil(_SMALL / longest)
    labels = [classes[c] for c in boxes.classes]
    if boxes.scores is not None:
        labels = [f"{name} {score:.2f}" for name, score in zip(labels, boxes.scores, strict=True)]
    labels = [label.replace("$", r"\$") for label in labels]  # Or what follows is a formula.
    colours = [_COLOURS[c % len(_COLOURS)] for c in boxes.classes]
    drawn = Visualizer(image, scale=scale).overlay_instances(
        boxes=boxes.boxes, labels=labels, assigned_colors=colours
    )
    out = io.BytesIO()
    Image.fromarray(drawn.get_image()).save(out, "JPEG", quality=90)
    return out.getvalue()

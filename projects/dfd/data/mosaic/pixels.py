"""Pixels, boxes and real pixels of YOLOX's augmentations. What is drawn, numpy's generator draws.

Images are (H,W,3) uint8 in RGB; boxes are (N,4) as x0, y0, x1, y1 in pixels, of which pixel i
covers [i, i+1). Nothing is changed in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from ..letterbox import FILL, fitted_size, resize_bilinear

_NEIGHBOURS = np.ones((3, 3), np.uint8)


@dataclass(frozen=True)
class Photo:
    """A photograph or a part of a picture, and its objects.

    Attributes:
        image, boxes: see above.
        classes: (N,) int64.
    """

    image: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray

    def fitted(self, size: float) -> Photo:
        """Resized to fit into a square of this side."""
        height, width = self.image.shape[:2]
        return self.resized(*fitted_size(height, width, size))

    def resized(self, height: int, width: int) -> Photo:
        """Resized in both directions, of which each has a ratio of its own."""
        old_height, old_width = self.image.shape[:2]
        ratios = np.array([width / old_width, height / old_height] * 2)
        image = resize_bilinear(self.image, height, width)
        return replace(self, image=image, boxes=self.boxes * ratios)

    def flipped(self) -> Photo:
        """Left and right exchanged."""
        return replace(
            self, image=cv2.flip(self.image, 1), boxes=_mirror(self.boxes, self.image.shape[1])
        )

    def recoloured(self, gains: Sequence[float]) -> Photo:
        """Hue, saturation and value moved by up to so much, each or not at random."""
        moves = np.random.uniform(-1, 1, 3) * gains * np.random.randint(0, 2, 3)
        hue, saturation, value = np.trunc(moves).astype(int)
        levels = np.arange(256)
        # Hue, in steps of two degrees, goes round.
        table = [
            (levels + hue) % 180,
            np.clip(levels + saturation, 0, 255),
            np.clip(levels + value, 0, 255),
        ]
        table = np.stack(table, axis=-1).astype(np.uint8)[None]
        hsv = cv2.LUT(cv2.cvtColor(self.image, cv2.COLOR_RGB2HSV), table)
        return replace(self, image=cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


@dataclass(frozen=True)
class Picture(Photo):
    """A square that shows photographs, or parts of them.

    Attributes:
        real: (H,W) uint8, 1 where the pixel is one of a photograph and nothing else, else 0.
    """

    real: np.ndarray

    def flipped(self) -> Picture:
        return replace(super().flipped(), real=cv2.flip(self.real, 1))

    def resized(self, height: int, width: int) -> Picture:
        # Interpolated as the image, so that less than 255 is where something else is mixed in.
        real = cv2.resize(self.real * 255, (width, height), interpolation=cv2.INTER_LINEAR)
        real = cv2.erode((real == 255).astype(np.uint8), _NEIGHBOURS)
        return replace(super().resized(height, width), real=real)

    def kept(self, which: np.ndarray) -> Picture:
        """With those objects alone that are named by a (N,) bool."""
        return replace(self, boxes=self.boxes[which], classes=self.classes[which])


def letterboxed(photo: Photo, size: int) -> Picture:
    """A photograph that fits into a square, in its top left corner."""
    height, width = photo.image.shape[:2]
    image = np.full((size, size, 3), FILL, np.uint8)
    real = np.zeros((size, size), np.uint8)
    image[:height, :width], real[:height, :width] = photo.image, 1
    return Picture(image, photo.boxes, photo.classes, real)


@dataclass(frozen=True)
class Affine:
    """Bounds of a random affine map: degrees, share of the picture, factors, degrees."""

    rotation: float
    translation: float
    scale: tuple[float, float]
    shear: float

    def draw(self, size: int) -> np.ndarray:
        """(2,3): where a point of the mosaic, (x, y, 1), comes to lie in a picture of this side.

        About the mosaic's top left corner, as in YOLOX.
        """
        angle = np.random.uniform(-self.rotation, self.rotation)
        turn = cv2.getRotationMatrix2D((0, 0), angle, np.random.uniform(*self.scale))[:, :2]
        along = np.tan(np.radians(np.random.uniform(-self.shear, self.shear, 2)))
        moved = np.random.uniform(-self.translation, self.translation, 2) * size
        sheared = np.array([[1, along[0]], [along[1], 1]]) @ turn
        return np.hstack([sheared, moved[:, None]])


def mosaic(photos: Sequence[Photo], size: int, affine: Affine) -> Picture:
    """Four photographs that meet at a random point, turned, scaled, sheared, moved and cut out.

    Not real are the fill, the seams between photographs, which interpolation mixes, and the pixels
    that border on either.

    Args:
        photos: top left, top right, bottom left, bottom right; each fits into a square of ``size``.
        size: side of the picture that is made.
    """
    side = 2 * size
    canvas = np.full((side, side, 3), FILL, np.uint8)
    labels = np.zeros((side, side), np.uint8)
    x, y = (int(np.random.uniform(0.5, 1.5) * size) for _ in range(2))
    boxes = []
    for i, photo in enumerate(photos):
        height, width = photo.image.shape[:2]
        left, top = x - width * (i % 2 == 0), y - height * (i < 2)
        boxes.append(_clipped(photo.boxes + [left, top, left, top], side))
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, side), min(top + height, side)
        canvas[y0:y1, x0:x1] = photo.image[y0 - top : y1 - top, x0 - left : x1 - left]
        # Without its border: all that is mixed into any other pixel is of this photograph.
        labels[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] = i + 1
    matrix = affine.draw(size)
    # OpenCV's coordinates are 0 at the centre of the first pixel, ours at its corner.
    half = np.full(2, 0.5)
    shifted = np.hstack([matrix[:, :2], (matrix @ [0.5, 0.5, 1] - half)[:, None]])
    image = cv2.warpAffine(
        canvas, shifted, (size, size), flags=cv2.INTER_LINEAR, borderValue=(FILL,) * 3
    )
    labels = cv2.warpAffine(labels, shifted, (size, size), flags=cv2.INTER_NEAREST)
    alike = cv2.erode(labels, _NEIGHBOURS) == cv2.dilate(labels, _NEIGHBOURS)
    return Picture(
        image,
        _clipped(_mapped(np.concatenate(boxes), matrix), size),
        np.concatenate([photo.classes for photo in photos]),
        (alike & (labels > 0)).astype(np.uint8),
    )


def mixed(picture: Picture, photo: Photo, scale: float, flip: bool) -> Picture:
    """A picture and a photograph, each at half its contrast, with the objects of both.

    The photograph is resized to fit into a square that is ``scale`` times the picture, and lies in
    a corner of it. That square is cut at random to the picture if it is larger. As in YOLOX, its
    fill is 114 within it and 0 beyond it, which its networks were trained on. Pixels are real where
    both show a photograph: elsewhere there is half of one, on something that is none.
    """
    size = picture.image.shape[0]
    square = max(1, int(size * scale))
    photo = photo.fitted(size * scale)
    photo = photo.flipped() if flip else photo
    height, width = photo.image.shape[:2]
    spare = square - size
    top, left = (-np.random.randint(0, spare) if spare > 0 else 0 for _ in range(2))
    image, real = np.zeros_like(picture.image), np.zeros_like(picture.real)
    image[: top + square, : left + square] = FILL
    left += square - width if flip else 0
    x0, x1 = np.clip([left, left + width], 0, size)
    y0, y1 = np.clip([top, top + height], 0, size)
    image[y0:y1, x0:x1] = photo.image[y0 - top : y1 - top, x0 - left : x1 - left]
    real[y0:y1, x0:x1] = 1
    boxes = _clipped(photo.boxes + [left, top, left, top], size)
    return Picture(
        cv2.addWeighted(picture.image, 0.5, image, 0.5, 0),
        np.concatenate([picture.boxes, boxes]),
        np.concatenate([picture.classes, photo.classes]),
        picture.real & cv2.erode(real, _NEIGHBOURS),
    )


def _mirror(boxes: np.ndarray, width: int) -> np.ndarray:
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)


def _clipped(boxes: np.ndarray, size: int) -> np.ndarray:
    return boxes.clip(0, size)


def _mapped(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The boxes around the mapped corners of boxes."""
    x, y = boxes[:, [0, 2, 0, 2]], boxes[:, [1, 1, 3, 3]]
    (a, b, c), (d, e, f) = matrix
    corners = np.stack([a * x + b * y + c, d * x + e * y + f], axis=-1)
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)

"""Images that fit into a square, their ratio kept: YOLOX's input, in training and in evaluation."""

from __future__ import annotations

import cv2
import detectron2.data.transforms as T
import numpy as np

from .mosaic.settings import check_size

# Around a photograph, and before it was normalised: YOLOX's networks take pixels as they are.
FILL = 114


def fitted_size(height: int, width: int, size: float) -> tuple[int, int]:
    """The largest (height, width) of an image's ratio in a square, cut to whole pixels.

    As YOLOX has it, and not rounded as by Detectron2's ``ResizeShortestEdge``, which makes some
    images one pixel larger. At least 1.
    """
    ratio = min(size / height, size / width)
    return max(1, int(height * ratio)), max(1, int(width * ratio))


def resize_bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """An image (H,W,C) of 8 bits in another size, as OpenCV does it: not smoothed before."""
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


class BilinearResize(T.ResizeTransform):
    """Detectron2's resizing, but of images by :func:`resize_bilinear`, not by Pillow."""

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        if interp is not None or img.dtype != np.uint8:
            return super().apply_image(img, interp)
        resized = resize_bilinear(np.ascontiguousarray(img), self.new_h, self.new_w)
        return resized.reshape(*resized.shape[:2], *img.shape[2:])


class Letterbox(T.Augmentation):
    """Resizes an image to fit into a square. Padding it to that square is left to the detector.

    The images that a YOLOX is evaluated on; its training images are made in the same way by
    ``MosaicMapper``, when it makes no mosaic.
    """

    def __init__(self, size: int) -> None:
        """
        Args:
            size: side of the square in pixels.

        Raises:
            UserError: it is not a multiple of 32.
        """
        super().__init__()
        self.size = check_size("Letterbox.size", size)

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        return BilinearResize(height, width, *fitted_size(height, width, self.size))

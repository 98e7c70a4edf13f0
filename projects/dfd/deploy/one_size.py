"""Images of one size, for a program that takes no other."""

from __future__ import annotations

import math

import detectron2.data.transforms as T
import numpy as np

from ..data.letterbox import BilinearResize, Letterbox

# Two ratios are one up to this; beyond it, pixels more or less on a side, as rounding makes them.
_RATIO, _PIXELS = 0.02, 2


class OneSize(T.Augmentation):
    """Makes images of one size, whatever their ratio.

    One that a run's own augmentations make that size goes through these, so that the network sees
    what it saw in the evaluation. Any other is resized straight to it, in the way of these.
    """

    def __init__(self, own: T.AugmentationList, height: int, width: int) -> None:
        super().__init__()
        self.own, self.size = own, (height, width)
        self._letterbox = any(isinstance(a, Letterbox) for a in own.augs)
        self._seen: dict[tuple[int, ...], tuple[int, int]] = {}

    def __call__(self, inputs: T.AugInput) -> T.Transform:
        if self._own_size(inputs.image) == self.size:
            return self.own(inputs)
        kind = BilinearResize if self._letterbox else T.ResizeTransform
        resize = kind(*inputs.image.shape[:2], *self.size)
        inputs.transform(resize)
        return resize

    def squashes(self, image: np.ndarray) -> bool:
        """Whether an image gets another ratio than by the run's own augmentations."""
        (h, w), (own_h, own_w) = self.size, self._own_size(image)
        apart = abs(math.log(h * own_w / (w * own_h)))
        return apart > _RATIO + _PIXELS / min(h, w, own_h, own_w)

    def _own_size(self, image: np.ndarray) -> tuple[int, int]:
        """Height and width by the run's own augmentations, which depend on the image's alone."""
        if image.shape not in self._seen:
            inputs = T.AugInput(image)
            self.own(inputs)
            self._seen[image.shape] = inputs.image.shape[:2]
        return self._seen[image.shape]

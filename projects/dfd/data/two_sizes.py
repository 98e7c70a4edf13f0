"""Images in two sizes: the student's, and a larger or smaller one for its teacher."""

from __future__ import annotations

from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.data import DatasetMapper

from ..ranges import check_positive
from .padding import real_pixels


def size_ratio(*, teacher: float, student: float) -> float:
    """The sides of the teacher's images over the student's, for configs that set both."""
    return teacher / student


class TwoSizeMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper``, which also gives the teacher's image of another size.

    The augmentations make the teacher's image, ``teacher_image``. Resized once more it is the
    student's ``image``, and everything else (boxes, masks) is the student's. Both show the same
    crop, flip and jitter. Where augmentations padded, ``teacher_valid``, (H,W) bool, says which of
    the teacher's pixels are real, as ``valid`` does of the student's.
    """

    def __init__(self, *, teacher_scale: float, **kwargs: Any) -> None:
        """
        Args:
            teacher_scale: sides of the teacher's image over the student's, as
                ``model.teacher.scale``.
            kwargs: Detectron2's.
        """
        super().__init__(**kwargs)
        check_positive("mapper.teacher_scale", teacher_scale)
        self.augmentations = _ThenResize(self.augmentations, ResizeBy(1 / teacher_scale))

    def __call__(self, dataset_dict: dict) -> dict:
        result = super().__call__(dataset_dict)
        image, real = self.augmentations.pop()
        if result is not None:
            result["teacher_image"] = torch.as_tensor(
                np.ascontiguousarray(image.transpose(2, 0, 1))
            )
            if real is not None:
                result["teacher_valid"] = real
        return result


class ResizeBy(T.Augmentation):
    """Resizes to so many times its sides, each at least one pixel."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        sides = [max(1, round(side * self.scale)) for side in (height, width)]
        return T.ResizeTransform(height, width, *sides)


class _ThenResize:
    """Augmentations and then a resizing, before which the image is kept."""

    def __init__(self, augmentations: T.AugmentationList, resize: ResizeBy) -> None:
        self.augmentations, self.resize = augmentations, resize
        self._kept: tuple[np.ndarray, torch.Tensor | None] | None = None

    @property
    def augs(self) -> list[T.Augmentation]:
        return [*self.augmentations.augs, self.resize]

    def __call__(self, inputs: T.AugInput) -> T.TransformList:
        before = inputs.image.shape[:2]
        transforms = self.augmentations(inputs)
        self._kept = inputs.image, real_pixels(transforms, *before)
        return transforms + T.TransformList([self.resize(inputs)])

    def pop(self) -> tuple[np.ndarray, torch.Tensor | None]:
        """The larger image, and which of its pixels are real, if not all."""
        kept, self._kept = self._kept, None
        return kept

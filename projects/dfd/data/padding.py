"""Which pixels of a mapped image show something, and which an augmentation has filled up.

Large-scale jitter, ``FixedSizeCrop`` for one, pads an image before the network sees it, within the
size that ``image`` has. Only the transforms know where.
"""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Callable
from typing import Any

import cv2
import detectron2.data.transforms as T
import numpy as np
import torch

from ..errors import UserError
from .letterbox import BilinearResize

logger = logging.getLogger(__name__)

# These show nothing but the image that they are given.
_NEVER_PAD = (
    BilinearResize,
    T.BlendTransform,
    T.ColorTransform,
    T.CropTransform,
    T.HFlipTransform,
    T.NoOpTransform,
    T.PILColorTransform,
    T.ResizeTransform,
    T.ScaleTransform,
    T.VFlipTransform,
)
_COLOURS = (T.BlendTransform, T.ColorTransform, T.PILColorTransform)
# Two images that differ in every pixel still do so where they can be seen, and nowhere else,
# whatever a transform fills up with.
_SHADES = (64, 192)


def real_pixels(transforms: T.TransformList, height: int, width: int) -> torch.Tensor | None:
    """Where an image shows something after it was transformed.

    Args:
        transforms: that were applied to it.
        height, width: of the image before.

    Returns:
        (H,W) bool of the image as it is now, True where it shows something and nothing else is
        mixed into it; None if that is everywhere.

    Raises:
        UserError: a transform cannot be applied once more.
    """
    steps = transforms.transforms
    if not any(_may_pad(step) for step in steps):
        return None
    light, dark = (np.full((height, width), shade, np.uint8) for shade in _SHADES)
    for step in steps:
        if type(step) in _COLOURS:
            continue
        before = light, dark
        light, dark = _both_again(step, *before)
        alike = light.shape == before[0].shape and not (light != dark).any()
        if alike and _keeps_places(step, *before):
            light, dark = before  # Contrast stretched, say: it tells no shade from another.
        elif type(step) in (T.ResizeTransform, BilinearResize):
            dark = np.where(_inside(light != dark, step), dark, light)
    real = light != dark
    return None if real.all() else torch.from_numpy(np.ascontiguousarray(real))


def _may_pad(step: T.Transform) -> bool:
    if type(step) is T.PadTransform:
        return any((step.x0, step.y0, step.x1, step.y1))
    return type(step) not in _NEVER_PAD


def _inside(real: np.ndarray, step: T.ResizeTransform) -> np.ndarray:
    """The real pixels of a resized image that no other pixel was mixed into."""
    # Bilinear: from the neighbours of the smaller of the two grids.
    reach = [
        math.ceil(max(1, new / old)) for new, old in ((step.new_h, step.h), (step.new_w, step.w))
    ]
    kernel = np.ones([2 * side + 1 for side in reach], np.uint8)
    return cv2.erode(real.astype(np.uint8), kernel) > 0


def _both_again(
    step: T.Transform, light: np.ndarray, dark: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both images through a step that draws the same for either (noise, say), and for nobody.

    As they were, if it draws otherwise each time, from a generator of its own, and moves nothing:
    where it comes out the same for both would be chance.

    Raises:
        UserError: such a step moves pixels.
    """
    states = np.random.get_state(), random.getstate(), torch.get_rng_state()
    # What these have does the same to every image that it is given.
    known = type(step).__module__.partition(".")[0] in ("detectron2", "fvcore", "dfd")
    found = []
    for image in (light, dark) if known else (light, dark, light):
        found.append(_again(step, image))
        np.random.set_state(states[0])
        random.setstate(states[1])
        torch.set_rng_state(states[2])
    if known or np.array_equal(found[0], found[2]):
        return found[0], found[1]
    if _keeps_places(step, light, dark) or not (light != dark).any():
        return light, dark
    raise UserError(
        f"{type(step).__name__} does another thing each time it is applied, so it cannot tell "
        "which pixels it fills up: let its augmentation draw what is random, or let the mapper "
        "put `valid`, (H,W) bool, into its records"
    )


def _keeps_places(step: T.Transform, light: np.ndarray, dark: np.ndarray) -> bool:
    """Whether a step moves nothing, of two images that differ somewhere before it."""
    if not (light != dark).any():
        return False
    height, width = light.shape
    corners = np.array([[0.0, 0.0], [width, 0.0], [0.0, height], [width, height]])
    try:
        return np.allclose(step.apply_coords(corners.copy()), corners)
    except Exception:  # It has no boxes to move; or it cannot say.
        return False


def _again(step: T.Transform, image: np.ndarray) -> np.ndarray:
    """One (H,W) image as a label map, or where a transform has no such thing, as a picture."""
    try:
        return np.asarray(step.apply_segmentation(image))
    except Exception:
        try:
            return np.asarray(step.apply_image(np.repeat(image[:, :, None], 3, axis=2)))[:, :, 0]
        except Exception as error:
            raise UserError(
                f"{type(step).__name__} does not tell which pixels it fills up "
                f"({type(error).__name__}: {error}): give it an apply_segmentation, or let the "
                "mapper put `valid`, (H,W) bool, into its records"
            ) from error


class MarkPadding:
    """A mapper whose records say which pixels are real, if not all of them are.

    Around any mapper that keeps its augmentations in ``augmentations`` and applies them once an
    image, as Detectron2's ``DatasetMapper`` and what is derived from it. To the record that it
    returns it adds ``valid``, (H,W) bool, which is absent where all of ``image`` is real. A record
    that has ``valid`` already is left as it is, so that a mapper of another kind (one that makes a
    mosaic, say) can tell by itself; its attribute ``marks_padding`` says that it does.
    """

    def __init__(self, mapper: Callable[[dict], dict | None]) -> None:
        """
        Args:
            mapper: turns a record into a model's input. It is copied, not changed.
        """
        self.mapper = mapper
        if hasattr(mapper, "image_format"):
            self.image_format = mapper.image_format  # The order that it reads.
        self.applied: list[tuple[T.TransformList, int, int]] = []
        if callable(getattr(mapper, "augmentations", None)):
            self.mapper = copy.copy(mapper)
            self.mapper.augmentations = _Recorded(mapper.augmentations, self.applied)
        elif not isinstance(mapper, MarkPadding) and not getattr(mapper, "marks_padding", False):
            logger.warning(
                "%s does not tell what it does to an image (it has no augmentations), so every "
                "pixel is taken for real: if it pads, let it put `valid`, (H,W) bool, into its "
                "records",
                getattr(mapper, "__name__", type(mapper).__name__),
            )

    def __call__(self, record: dict) -> dict | None:
        """
        Raises:
            UserError: where the record comes from more than one image and one was padded, or its
                image is not the one that the augmentations made.
        """
        self.applied.clear()
        mapped = self.mapper(record)
        if not isinstance(mapped, dict) or mapped.get("valid") is not None:
            return mapped
        masks = [(real_pixels(*applied), applied) for applied in self.applied]
        if all(mask is None for mask, _ in masks):
            return mapped
        size = tuple(mapped["image"].shape[-2:])
        if len(masks) > 1 or tuple(masks[0][0].shape) != size:
            raise UserError(
                f"{type(self.mapper).__name__} pads {record.get('file_name', 'an image')} and "
                f"makes {size[0]} x {size[1]} pixels of {len(masks)} augmented images, so it "
                "cannot be told where the padding is: let it put `valid`, (H,W) bool, into its "
                "records"
            )
        mapped["valid"] = masks[0][0]
        return mapped


class _Recorded:
    """Augmentations that note what they have done."""

    def __init__(self, augmentations: Callable, applied: list) -> None:
        self.augmentations, self.applied = augmentations, applied

    def __call__(self, inputs: T.AugInput) -> T.TransformList:
        height, width = inputs.image.shape[:2]
        transforms = self.augmentations(inputs)
        if isinstance(transforms, T.Transform):
            self.applied.append((T.TransformList([transforms]), height, width))
        return transforms

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "augmentations":
            raise AttributeError(name)  # While it is being unpickled, there is nothing to ask.
        return getattr(self.augmentations, name)

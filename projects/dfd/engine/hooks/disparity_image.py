"""Pictures of where student and teacher are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from torch import Tensor

# The end of the colour scale, fixed so that pictures of different iterations compare. At the
# "level" scale, 1 is the teacher's own variance: what a student that knows only the mean is apart
# by.
MAX_DISPARITY = 2.0
_TITLE_HEIGHT = 18


def draw_disparity(
    batched_inputs: Sequence[dict],
    maps: Mapping[str, tuple[Tensor, Tensor]],
    input_format: str,
) -> np.ndarray:
    """One row an image: the image, then the disparity of each level over it.

    Args:
        batched_inputs: Detectron2's; ``image`` is (3,H,W), [0, 255], in ``input_format`` order.
            Only what lies around its ``valid`` pixels, where it has them, is shown.
        maps: level name to ((N,h,w) disparity, (N,h,w) bool valid).

    Returns:
        (rows, columns, 3) uint8, RGB.
    """
    images = [_without_padding(item) for item in batched_inputs]
    height, width = (max(image.shape[i] for image in images) for i in (0, 1))
    rows = []
    for index, image in enumerate(images):
        if input_format == "BGR":
            image = image[:, :, ::-1]
        image = np.ascontiguousarray(image.clip(0, 255).astype(np.uint8))
        tiles = [_tile(image, "image", height, width)]
        for name, (disparity, valid) in maps.items():
            overlay = _overlay(image, disparity[index], valid[index])
            inside = disparity[index][valid[index]]
            mean = float(inside.mean()) if inside.numel() else float("nan")
            tiles.append(_tile(overlay, f"{name}  mean {mean:.2f}", height, width))
        rows.append(np.concatenate(tiles, axis=1))
    return np.concatenate(rows, axis=0)


def _without_padding(item: dict) -> np.ndarray:
    """The part (h,w,3) of an image in which something is to be seen."""
    image = item["image"].cpu().numpy().transpose(1, 2, 0)
    return image if item.get("valid") is None else image[_bounds(item["valid"])]


def _bounds(mask: Tensor) -> tuple[slice, slice]:
    """The smallest rows and columns that hold all that is True of an (H,W) mask."""
    places = [mask.any(dim=dim).nonzero().flatten().tolist() or [0, -1] for dim in (1, 0)]
    return tuple(slice(along[0], along[-1] + 1) for along in places)


def _overlay(image: np.ndarray, disparity: Tensor, valid: Tensor) -> np.ndarray:
    cells = disparity[_bounds(valid)].float().cpu().numpy() / MAX_DISPARITY
    if cells.size == 0:
        return image
    heat = (cells.clip(0, 1) * 255).astype(np.uint8)
    heat = cv2.resize(heat, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    heat = cv2.applyColorMap(heat, cv2.COLORMAP_VIRIDIS)[:, :, ::-1]
    return cv2.addWeighted(image, 0.35, np.ascontiguousarray(heat), 0.65, 0)


def _tile(image: np.ndarray, title: str, height: int, width: int) -> np.ndarray:
    tile = np.full((height + _TITLE_HEIGHT, width + 2, 3), 255, np.uint8)
    tile[_TITLE_HEIGHT : _TITLE_HEIGHT + image.shape[0], : image.shape[1]] = image
    cv2.putText(tile, title, (2, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return tile

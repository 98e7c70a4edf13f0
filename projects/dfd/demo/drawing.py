"""Draws the images of the generated dataset of shapes.

Eight classes are told apart by shape alone: colour, texture, size, rotation and background are
drawn independently of the class, the proportions vary within a class (a ring may be nearly a disc,
a star nearly a pentagon), and bars, half discs and blobs of no class lie among the objects and
partly over them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np
from numpy.random import Generator

SHAPE_CLASSES = ("circle", "ring", "crescent", "square", "triangle", "star", "cross", "arrow")

# Raise it with every change of the drawing, so that a folder made by older code is refused.
VERSION = 1
SPLITS = ("train", "val")
# The least part of an object that stays visible at full clutter, of its area including what the
# border cuts off.
_MIN_VISIBLE = 0.5


def draw_image(
    *,
    seed: int,
    split: str,
    index: int,
    size: int,
    clutter: float = 1.0,
    classes: Sequence[str] = SHAPE_CLASSES,
) -> tuple[np.ndarray, list[dict]]:
    """Draws one image of the dataset.

    Args:
        clutter: from 0 (hardly any distractors, no small objects, little overlap, calm backgrounds)
            to 1.
        classes: of the objects, in the order of the class ids.

    Returns:
        The image, (size, size, 3) uint8 BGR, and its objects in COCO form without ids
        (``category_id`` from 1, ``bbox`` as x, y, width, height in pixels, ``area``,
        ``segmentation``). There is at least one object.
    """
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    calm = 1 - clutter
    canvas = _texture(rng, size, detail=float(rng.uniform(0.2, 1.0 - 0.6 * calm)))
    owner = np.full((size, size), -1, np.int32)
    objects: list[dict] = []
    full: list[float] = []
    wanted = int(rng.integers(1, 8))
    distractors = round(clutter * int(rng.integers(1, 6)))
    smallest = math.log(0.045 + 0.055 * calm)
    min_visible = _MIN_VISIBLE + 0.4 * calm
    plan = [True] * wanted + [False] * distractors
    rng.shuffle(plan)
    for is_object in [*plan, True]:
        # The last entry only makes sure that the image has an object.
        if is_object and objects and len(objects) >= wanted:
            continue
        for _ in range(20 if objects else 500):
            category = int(rng.integers(len(classes)))
            radius = size * math.exp(rng.uniform(smallest, math.log(0.27)))
            outline = _outline(rng, classes[category]) if is_object else _distractor(rng)
            points = _place(rng, outline, radius, size)
            mask = _mask(points, size)
            inside = mask > 127
            if _fits(points, inside, owner, full, is_object, min_visible):
                break
        else:
            continue
        _paint(rng, canvas, mask, radius)
        owner[inside] = len(objects) if is_object else -1
        if is_object:
            clipped = _clip(points, size)
            full.append(_area(points))
            objects.append(_annotation(clipped, category))
    return _light(rng, canvas), objects


def _fits(
    points: np.ndarray,
    inside: np.ndarray,
    owner: np.ndarray,
    full: list[float],
    is_object: bool,
    min_visible: float,
) -> bool:
    """Whether a shape may be drawn on top: it and all objects below stay visible enough."""
    if is_object and (inside.sum() < _area(points) * 0.7 or inside.sum() < 20):
        return False
    covered = np.bincount(owner[inside] + 1, minlength=len(full) + 1)[1:]
    if not covered.any():
        return True
    left = np.bincount(owner.ravel() + 1, minlength=len(full) + 1)[1:] - covered
    return bool((left >= np.asarray(full) * min_visible).all())


def _annotation(points: np.ndarray, category: int) -> dict:
    x0, y0 = points.min(axis=0)
    x1, y1 = points.max(axis=0)
    return {
        "category_id": category + 1,
        "bbox": [round(float(v), 2) for v in (x0, y0, x1 - x0, y1 - y0)],
        "area": round(_area(points), 2),
        "segmentation": [[round(float(v), 2) for v in points.ravel()]],
    }


# Outlines: (n, 2) vertices of one closed polygon around the origin, with a radius of about 1.


def _arc(start: float, stop: float, radius: float = 1.0, points: int = 40) -> np.ndarray:
    t = np.linspace(start, stop, points)
    return radius * np.stack([np.cos(t), np.sin(t)], axis=1)


def _outline(rng: Generator, name: str) -> np.ndarray:
    if name == "circle":
        return _arc(0, 2 * math.pi)[:-1]
    if name == "ring":
        # One polygon with a slit, because COCO's lists of polygons cannot say "hole".
        return np.concatenate([_arc(0, 2 * math.pi), _arc(2 * math.pi, 0, rng.uniform(0.4, 0.75))])
    if name == "crescent":
        # The outer arc, then back along the circle that is cut out of it.
        shift, half = rng.uniform(0.35, 0.75), rng.uniform(0.6, 0.85)
        half *= math.pi
        corner = np.array([math.cos(half), math.sin(half)])
        centre = np.array([-shift, 0.0])
        back = math.atan2(corner[1], corner[0] + shift)
        inner = _arc(back, -back, float(np.hypot(*(corner - centre)))) + centre
        points = np.concatenate([_arc(-half, half), inner[1:-1]])
        return points
    if name == "square":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [0.85, 0.85 * rng.uniform(0.75, 1)]
    if name == "triangle":
        return np.array([[0, -1], [0.9, 0.75], [-0.9, 0.75]]) * [rng.uniform(0.7, 1.1), 1]
    if name == "star":
        spikes, depth = int(rng.integers(5, 7)), rng.uniform(0.4, 0.65)
        t = np.arange(2 * spikes) * math.pi / spikes
        r = np.where(np.arange(2 * spikes) % 2, depth, 1.0)
        return np.stack([r * np.cos(t), r * np.sin(t)], axis=1)
    if name == "cross":
        a, b = rng.uniform(0.2, 0.42), 1.0
        return np.array(
            [[-a, -b], [a, -b], [a, -a], [b, -a], [b, a], [a, a],
             [a, b], [-a, b], [-a, a], [-b, a], [-b, -a], [-a, -a]]
        )  # fmt: skip
    shaft, neck, wing = rng.uniform(0.15, 0.35), rng.uniform(-0.1, 0.3), rng.uniform(0.6, 0.85)
    return np.array(
        [[1, 0], [neck, wing], [neck, shaft], [-1, shaft],
         [-1, -shaft], [neck, -shaft], [neck, -wing]]
    )  # fmt: skip


def _distractor(rng: Generator) -> np.ndarray:
    """An outline of no class: a bar, a half disc, an L, or a smooth blob."""
    kind = rng.integers(4)
    if kind == 0:
        w = rng.uniform(0.06, 0.2)
        return np.array([[-1.5, -w], [1.5, -w], [1.5, w], [-1.5, w]])
    if kind == 1:
        return _arc(0, math.pi)
    if kind == 2:
        w = rng.uniform(0.3, 0.6)
        return np.array([[-1, -1], [-1 + w, -1], [-1 + w, 1 - w], [1, 1 - w], [1, 1], [-1, 1]])
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    r = 0.75 + sum(
        rng.uniform(0.1, 0.22) * np.cos(k * t + rng.uniform(0, 2 * math.pi)) for k in (2, 3)
    )
    return np.stack([1.3 * r * np.cos(t), 0.7 * r * np.sin(t)], axis=1)


def _place(rng: Generator, outline: np.ndarray, radius: float, size: int) -> np.ndarray:
    """Rotates, scales, slightly shears and moves an outline; vertices in pixels."""
    angle = rng.uniform(0, 2 * math.pi)
    c, s = math.cos(angle), math.sin(angle)
    shear = np.array([[1.0, rng.uniform(-0.12, 0.12)], [0.0, rng.uniform(0.85, 1.0)]])
    margin = 0.4 * radius
    centre = rng.uniform(margin, size - margin, 2)
    return radius * outline @ shear.T @ np.array([[c, s], [-s, c]]) + centre


def _mask(points: np.ndarray, size: int) -> np.ndarray:
    """Antialiased coverage, (size, size) uint8.

    OpenCV's own antialiasing widens a polygon by more than half a pixel on every side, which
    would make the boxes of small objects wrong; four samples per pixel side keep it to 0.15.
    """
    mask = np.zeros((size, size), np.uint8)
    x0, y0 = np.clip(np.floor(points.min(axis=0)).astype(int), 0, size)
    x1, y1 = np.clip(np.ceil(points.max(axis=0)).astype(int), 0, size)
    if x0 < x1 and y0 < y1:
        fine = np.zeros((4 * (y1 - y0), 4 * (x1 - x0)), np.uint8)
        # OpenCV's integer coordinates are pixel centres, COCO's are pixel corners.
        fixed = np.round(((points - (x0, y0)) * 4 - 0.5) * 16).astype(np.int32)
        cv2.fillPoly(fine, [fixed], 255, cv2.LINE_8, 4)
        mask[y0:y1, x0:x1] = cv2.resize(fine, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA)
    return mask


def _area(points: np.ndarray) -> float:
    x, y = points[:, 0], points[:, 1]
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def _clip(points: np.ndarray, size: int) -> np.ndarray:
    """The part of a polygon within the image (Sutherland and Hodgman)."""
    for axis in (0, 1):
        for limit, sign in ((0.0, 1.0), (float(size), -1.0)):
            depth = sign * (points[:, axis] - limit)
            if (depth >= 0).all():
                continue
            result = []
            for p, q, dp, dq in zip(
                points, np.roll(points, -1, 0), depth, np.roll(depth, -1), strict=True
            ):
                if dp >= 0:
                    result.append(p)
                if (dp >= 0) != (dq >= 0):
                    result.append(p + (q - p) * (dp / (dp - dq)))
            points = np.array(result)
    return points


# Painting: float32 BGR images with values from 0 to 255.


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of every pixel, in image sizes from -0.5 to 0.5."""
    t = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    return np.ascontiguousarray(np.broadcast_to(t, (size, size))), np.ascontiguousarray(
        np.broadcast_to(t[:, None], (size, size))
    )


def _along(rng: Generator, size: int) -> np.ndarray:
    """Position of every pixel along a random direction, about -0.7 to 0.7."""
    x, y = _grid(size)
    angle = rng.uniform(0, 2 * math.pi)
    return np.float32(math.cos(angle)) * x + np.float32(math.sin(angle)) * y


def _noise(rng: Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise from 0 to 1 with ``cells`` independent values per side."""
    small = rng.random((cells, cells), dtype=np.float32)
    return cv2.resize(small, (size, size), interpolation=cv2.INTER_LINEAR)


def _pattern(rng: Generator, size: int) -> np.ndarray:
    """A random pattern, (size, size) float32 from 0 to 1."""
    kind = rng.integers(5)
    if kind == 0:
        return np.clip(_along(rng, size) + 0.5, 0, 1)
    if kind == 1:
        wave = np.sin(_along(rng, size) * np.float32(rng.uniform(15, 90)))
        return np.clip(wave * np.float32(rng.uniform(0.5, 4)) * 0.5 + 0.5, 0, 1)
    if kind == 2:
        angle, k = rng.uniform(0, math.pi), rng.uniform(10, 40)
        x, y = _grid(size)
        c, s = np.float32(k * math.cos(angle)), np.float32(k * math.sin(angle))
        return (np.sin(c * x + s * y) * np.sin(c * y - s * x) > 0).astype(np.float32)
    if kind == 3:
        return _noise(rng, size, int(rng.integers(4, 16)))
    return np.clip((_noise(rng, size, int(rng.integers(5, 24))) - 0.5) * 6 + 0.5, 0, 1)


def _texture(rng: Generator, size: int, detail: float) -> np.ndarray:
    """A pattern between two random colours that differ by about ``detail`` of the range."""
    first = rng.uniform(0, 255, 3)
    second = first + (rng.uniform(0, 255, 3) - first) * detail
    weight = _pattern(rng, size)
    if rng.random() < 0.5:
        weight = 0.65 * weight + 0.35 * _pattern(rng, size)
    difference = (second - first).astype(np.float32)
    return first.astype(np.float32) + weight[..., None] * difference


def _paint(rng: Generator, canvas: np.ndarray, mask: np.ndarray, radius: float) -> None:
    """Fills a mask with a texture that stands out from what is below; changes ``canvas``."""
    size = canvas.shape[0]
    x, y, w, h = cv2.boundingRect(mask)
    if w == 0 or h == 0:
        return
    area = np.s_[y : y + h, x : x + w]
    alpha = mask[area].astype(np.float32)[..., None] / 255
    below = (canvas[area] * alpha).sum(axis=(0, 1)) / max(float(alpha.sum()), 1e-3)
    # Colours that are too close to the local background are drawn again.
    for _ in range(8):
        colour = rng.uniform(0, 255, 3)
        if np.abs(colour - below).mean() > 45:
            break
    fill = np.broadcast_to(colour.astype(np.float32), (h, w, 3))
    if rng.random() < 0.6:
        other = colour + (rng.uniform(0, 255, 3) - colour) * rng.uniform(0.1, 0.45)
        weight = _pattern(rng, size)[area][..., None]
        fill = fill + weight * (other - colour).astype(np.float32)
    if rng.random() < 0.25:
        shift = max(1, round(0.12 * radius))
        shadow = cv2.GaussianBlur(np.roll(mask, (shift, shift), (0, 1)), (0, 0), 0.5 + shift / 2)
        shadow[:shift], shadow[:, :shift] = 0, 0
        canvas *= 1 - shadow.astype(np.float32)[..., None] * (0.5 / 255)
    canvas[area] += alpha * (fill - canvas[area])


def _light(rng: Generator, canvas: np.ndarray) -> np.ndarray:
    """Light gradient, shadow, gamma, blur and noise of the camera; uint8."""
    size = canvas.shape[0]
    light = 1 + np.float32(rng.uniform(0, 0.7)) * _along(rng, size)
    if rng.random() < 0.4:
        edge = (_along(rng, size) - np.float32(rng.uniform(-0.4, 0.4))) * np.float32(
            rng.uniform(5, 40)
        )
        light *= 1 - np.float32(rng.uniform(0.2, 0.55)) * np.clip(edge + 0.5, 0, 1)
    image = np.clip(canvas * light[..., None], 0, 255)
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.1) * size / 128)
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0, 14))
    gamma = math.exp(rng.uniform(math.log(0.65), math.log(1.5)))
    curve = (255 * (np.arange(256) / 255) ** gamma).round().astype(np.uint8)
    return cv2.LUT(np.clip(image, 0, 255).astype(np.uint8), curve)

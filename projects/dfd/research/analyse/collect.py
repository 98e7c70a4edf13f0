"""One pass over the test images: what every checkpoint's disparity is, and where it errs.

Shape shorthand: L levels, M boxes, H x W cells of one level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ...deploy.inputs import evenly_spaced
from ...distill.contract import feature_modules, tap
from ...distill.detector import DistilledDetector
from ...distill.real_pixels import image_area
from ...errors import UserError
from .load import LabelledImage, Snapshot, TestImages
from .matching import (
    IGNORED,
    SIZES,
    UNMATCHED,
    cells_inside,
    match_detections,
    owners,
    size_classes,
)
from .statistics import LogHistogram, rank_correlation

# What a box is. A label is one of the first two, a detection one of the last.
OUTCOMES = ("detected", "missed", "false")
DETECTED, MISSED, FALSE = range(3)
# The cells that a box of some kind covers; "errors" are missed and false together.
GROUPS = ("image", "background", *OUTCOMES, "errors")
BACKGROUND = len(SIZES)  # Behind the sizes of boxes.

Maps = Mapping[str, np.ndarray]


@dataclass
class LevelTally:
    """One level so far. ``sizes``: (4,2) total and number of the cells of small, medium and large
    objects and of background; ``regions``: (2,2) the same of the low and the high cells;
    ``correlations``: of each image, with the last checkpoint's map."""

    histogram: LogHistogram = field(default_factory=LogHistogram)
    sizes: np.ndarray = field(default_factory=lambda: np.zeros((BACKGROUND + 1, 2)))
    regions: np.ndarray = field(default_factory=lambda: np.zeros((2, 2)))
    correlations: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """Labels, and detections that are none of them, on one image.

    ``boxes`` (M,4) XYXY in pixels of the input, ``classes`` (M,), ``kinds`` (M,) into OUTCOMES.
    """

    boxes: np.ndarray
    classes: np.ndarray
    kinds: np.ndarray


@dataclass
class Tally:
    """One checkpoint over the images so far.

    Attributes:
        levels: by name.
        outcomes: one an image.
        means: one an image, (M, L + 1): the mean disparity of the cells inside each box of the
            outcome, over all levels and then on each; nan where no cell's centre is inside.
        cells: one an image, (L, GROUPS, 3): the number of cells, of those above the image's mean,
            and the total disparity.
    """

    iteration: int
    levels: dict[str, LevelTally]
    outcomes: list[Outcome] = field(default_factory=list)
    means: list[np.ndarray] = field(default_factory=list)
    cells: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class Example:
    """An image to be shown: (h,w,3) uint8 RGB, and at each of some checkpoints its maps and boxes.

    ``views`` is a list of (iteration, maps by level, outcome).
    """

    name: str
    image: np.ndarray
    views: list[tuple[int, dict[str, np.ndarray], Outcome]]


def collect(
    *,
    model: DistilledDetector,
    snapshots: Sequence[Snapshot],
    images: TestImages,
    score: float,
    iou: float,
    num_examples: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Tally], list[Example]]:
    """Measure every checkpoint on every image, one image at a time.

    So nothing is padded to another's size, and what the scale of disparity takes from the data
    (the spread of features) it takes from the image alone. The student runs as in evaluation, its
    batch norms with their running statistics, in fp32; the teacher runs once an image.

    Args:
        score, iou: a detection counts from this score on, and finds a label from this overlap on.
        num_examples: evenly spaced images that are kept for pictures, at the first and the last
            checkpoint.
        progress: called with the number of images done and of all.

    Raises:
        UserError: an image cannot be read, or disparity is not finite.
    """
    strides = {pair.name: pair.stride for pair in model.head.pairs}
    tallies = [
        Tally(snapshot.iteration, {name: LevelTally() for name in strides})
        for snapshot in snapshots
    ]
    shown = set(evenly_spaced(len(images), num_examples))
    examples = []
    for index, image in enumerate(images):
        teacher = model.teacher(
            [image.item],
            input_format=model.input_format,
            device=model.device,
            **model.head.features,
        )
        views = [(s.iteration, *_look(s, teacher, image, score, iou)) for s in snapshots]
        for tally, (_, maps, outcome) in zip(tallies, views, strict=True):
            add_image(tally, image, maps, outcome, last=views[-1][1], strides=strides)
        if index in shown:
            ends = views if len(views) == 1 else [views[0], views[-1]]
            examples.append(_example(image, ends, model.input_format))
        progress(index + 1, len(images))
    return tallies, examples


@torch.no_grad()
def _look(
    snapshot: Snapshot,
    teacher: Mapping[str, torch.Tensor],
    image: LabelledImage,
    score: float,
    iou: float,
) -> tuple[dict[str, np.ndarray], Outcome]:
    """The maps (H,W) by level, nan on padding, and the outcome of one checkpoint on one image."""
    with tap(feature_modules(snapshot.student, "student", **snapshot.head.features)) as pyramid:
        instances = snapshot.student([image.item])[0]["instances"].to("cpu")
    found = snapshot.head.disparity_maps(pyramid, teacher, **image_area([image.item]))
    maps = {}
    for name, (disparity, valid) in found.items():
        # nan where an augmentation padded; a single image has no other padding.
        maps[name] = disparity[0].masked_fill(~valid[0], float("nan")).cpu().numpy()
        if not disparity[valid].isfinite().all():
            raise UserError(
                f"the disparity on {name} after {snapshot.iteration} iterations is not finite on "
                f"{image.item['file_name']}: the run has diverged"
            )
    instances = instances[instances.scores >= score]
    boxes = instances.pred_boxes.tensor.numpy().astype(float) * image.scale
    classes = instances.pred_classes.numpy()
    return maps, judge(image, boxes, classes, instances.scores.numpy(), iou)


def judge(
    image: LabelledImage, boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray, iou: float
) -> Outcome:
    """Which labels were detected and which missed, and which detections are false.

    Args:
        boxes: (D,4) detections in pixels of the input.
    """
    match = match_detections(
        detections=boxes,
        classes=classes,
        scores=scores,
        labels=image.labels,
        label_classes=image.label_classes,
        crowds=image.crowds,
        crowd_classes=image.crowd_classes,
        iou=iou,
    )
    kinds = np.full(len(image.labels), MISSED)
    kinds[match[(match != UNMATCHED) & (match != IGNORED)]] = DETECTED
    false = match == UNMATCHED
    return Outcome(
        boxes=np.concatenate([image.labels, boxes[false]]),
        classes=np.concatenate([image.label_classes, classes[false]]),
        kinds=np.concatenate([kinds, np.full(false.sum(), FALSE)]),
    )


def add_image(
    tally: Tally,
    image: LabelledImage,
    maps: Maps,
    outcome: Outcome,
    *,
    last: Maps,
    strides: Mapping[str, int],
) -> None:
    """Add what one image shows to a tally.

    Args:
        maps: level name to (H,W) disparity, nan on padding; ``last``: of the last checkpoint.
        strides: level name to pixels per cell.
    """
    totals = np.zeros((len(outcome.boxes), len(maps), 2))
    cells = np.zeros((len(maps), len(GROUPS), 3))
    for position, (name, disparity) in enumerate(maps.items()):
        level = tally.levels[name]
        rows, columns = disparity.shape
        valid = ~np.isnan(disparity)
        inside, in_crowd = (
            valid & cells_inside(boxes, stride=strides[name], rows=rows, columns=columns)
            for boxes in (outcome.boxes, image.crowds)
        )
        # What a crowd covers and no label claims is neither object nor background, nor is padding.
        unclear = in_crowd.any(axis=0) | ~valid
        high = disparity > (disparity[valid].mean() if valid.any() else np.inf)
        level.histogram.add(disparity[valid])
        level.regions += [_total(disparity[valid & ~high]), _total(disparity[high])]
        level.correlations.append(rank_correlation(disparity[valid], last[name][valid]))
        level.sizes += _by_size(disparity, image.labels, inside[: len(image.labels)], unclear)
        for index, covered in enumerate(inside):
            totals[index, position] = _total(disparity[covered])
        for group, covered in enumerate(_groups(inside, outcome.kinds, unclear, valid)):
            total, count = _total(disparity[covered])
            cells[position, group] = count, high[covered].sum(), total
    tally.outcomes.append(outcome)
    tally.means.append(_means(totals))
    tally.cells.append(cells)


def _total(values: np.ndarray) -> tuple[float, int]:
    return float(values.sum(dtype=np.float64)), values.size


def _by_size(
    disparity: np.ndarray, labels: np.ndarray, inside: np.ndarray, unclear: np.ndarray
) -> np.ndarray:
    """(4,2): total and number of the cells of each size of object, and of background."""
    owner = owners(labels, inside)
    region = np.where(unclear, -1, BACKGROUND)
    region[owner >= 0] = size_classes(labels)[owner[owner >= 0]]
    return np.array([_total(disparity[region == k]) for k in range(BACKGROUND + 1)])


def _groups(
    inside: np.ndarray, kinds: np.ndarray, unclear: np.ndarray, valid: np.ndarray
) -> list[np.ndarray]:
    """The cells (H,W) of each of ``GROUPS``."""
    covered = [inside[kinds == kind].any(axis=0) for kind in range(len(OUTCOMES))]
    background = ~(inside.any(axis=0) | unclear)
    return [valid, background, *covered, covered[MISSED] | covered[FALSE]]


def _means(totals: np.ndarray) -> np.ndarray:
    """(M, L, 2) totals and numbers of cells as (M, L + 1) means: of all levels, and of each."""
    totals = np.concatenate([totals.sum(axis=1, keepdims=True), totals], axis=1)
    means = np.full(totals.shape[:2], np.nan)
    return np.divide(totals[..., 0], totals[..., 1], out=means, where=totals[..., 1] > 0)


def _example(
    image: LabelledImage, views: list[tuple[int, dict[str, np.ndarray], Outcome]], order: str
) -> Example:
    pixels = image.item["image"].cpu().numpy().transpose(1, 2, 0).clip(0, 255).astype(np.uint8)
    pixels = pixels[:, :, ::-1] if order == "BGR" else pixels
    return Example(image.item["file_name"].rpartition("/")[2], np.ascontiguousarray(pixels), views)

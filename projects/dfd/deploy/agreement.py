"""Whether two forms of one detector find the same on images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from detectron2.structures import Instances

# Rounding makes differences of 1e-4 pixels and 1e-6 in scores; what is another detection differs
# by far more.
_PIXELS, _SCORE = 0.5, 1e-3


@dataclass(frozen=True)
class Agreement:
    """
    Args:
        detections: of the first form, on all images.
        unmatched: detections of either that have no equal in the other.
        boxes: the largest difference of a coordinate between equals, in pixels.
        scores: the same of scores.
    """

    detections: int
    unmatched: int
    boxes: float
    scores: float


def compare(
    first: Callable[[np.ndarray], Instances],
    second: Callable[[np.ndarray], Instances],
    images: Iterable[np.ndarray],
) -> Agreement:
    """Compare what two forms of one detector find.

    Two detections are equal if they are of one class, their coordinates are within half a pixel and
    their scores within 0.001. One whose score is that close to the lowest of its image, and within
    a hundredth of it, needs no equal: rounding alone decides whether it is above the threshold, or
    among the best so many.
    """
    total = unmatched = 0
    boxes = scores = 0.0
    for image in images:
        a, b = first(image), second(image)
        total += len(a)
        pairs = _pairs(a, b)
        unmatched += _alone(a, {i for i, _ in pairs}) + _alone(b, {j for _, j in pairs})
        for i, j in pairs:
            difference = a.pred_boxes.tensor[i] - b.pred_boxes.tensor[j]
            boxes = max(boxes, float(difference.abs().max()))
            scores = max(scores, float((a.scores[i] - b.scores[j]).abs()))
    return Agreement(total, unmatched, boxes, scores)


def _alone(found: Instances, matched: set[int]) -> int:
    """How many are without an equal and need one."""
    if not matched:
        return len(found)  # No threshold explains this.
    lowest = float(found.scores.min())
    # Where all scores are near zero, all are near the lowest.
    excused = lowest + min(_SCORE, lowest / 100)
    return sum(
        i not in matched and score > excused for i, score in enumerate(found.scores.tolist())
    )


def _pairs(a: Instances, b: Instances) -> list[tuple[int, int]]:
    """Equal detections, each used once."""
    if not len(a) or not len(b):
        return []
    apart = (a.pred_boxes.tensor[:, None] - b.pred_boxes.tensor[None]).abs().amax(dim=2)
    equal = (
        (apart <= _PIXELS)
        & ((a.scores[:, None] - b.scores[None]).abs() <= _SCORE)
        & (a.pred_classes[:, None] == b.pred_classes[None])
    )
    pairs, used = [], set()
    for i in range(len(a)):
        for j in apart[i].argsort().tolist():
            if equal[i, j] and j not in used:
                used.add(j)
                pairs.append((i, j))
                break
            if apart[i, j] > _PIXELS:
                break
    return pairs

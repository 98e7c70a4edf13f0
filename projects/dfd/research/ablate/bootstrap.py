"""How sure a difference between cells is over the test images: a paired bootstrap.

The seeds of an ablation tell how far training is chance. That the test images are a sample too
they do not tell: here the same detections are measured again and again, each time on as many
images drawn with replacement, the same for all runs.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from omegaconf import OmegaConf
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ...data import registered_name
from ...data.evaluator import load_detections
from ...data.loaders import build_evaluator
from ...engine.evaluation import DETECTIONS
from ...errors import UserError, first_line
from ..resampling import draw_images
from .estimates import DONE, EMA, METRICS, CellResult, Outcome

PREDICTIONS = "coco_instances_results.json"
_SIZES = {"APs": "small", "APm": "medium", "APl": "large"}
_IOUS = {"AP50": 0.5, "AP75": 0.75}
# Values of one array at a time: all draws of a class of COCO would take gigabytes.
_CHUNK = 2**24


@dataclass(frozen=True)
class Matches:
    """Detections of one class, the highest score first, and the objects of each image.

    ``images`` (M,) is the image of each detection; ``correct`` and ``counted`` (T,M) tell at each
    overlap whether it matches an object, and whether it counts at all; ``objects`` (I,) counts.
    """

    images: np.ndarray
    correct: np.ndarray
    counted: np.ndarray
    objects: np.ndarray


def average_precision(matches: Sequence[Matches], weights: np.ndarray) -> np.ndarray:
    """COCO's AP in percent, as if each image were there as often as its weight says.

    Args:
        matches: of each class.
        weights: (draws, images).

    Returns:
        (draws,): mean over the classes that the drawn images have, NaN if they have none.
    """
    each = np.stack([_of_class(m, weights) for m in matches])
    known = ~np.isnan(each)
    total = np.where(known, each, 0).sum(axis=0)
    return 100 * np.divide(
        total, known.sum(axis=0), out=np.full(len(weights), np.nan), where=known.any(axis=0)
    )


def _of_class(matches: Matches, weights: np.ndarray) -> np.ndarray:
    objects = weights @ matches.objects
    result = np.full(len(weights), np.nan)
    step = max(1, _CHUNK // max(1, len(matches.images)))
    for start in range(0, len(weights), step):
        chosen = np.arange(start, min(start + step, len(weights)))
        chosen = chosen[objects[chosen] > 0]
        if len(chosen):
            drawn = weights[np.ix_(chosen, matches.images)]
            result[chosen] = np.mean(
                [
                    _interpolated(drawn * correct * counted, drawn * counted, objects[chosen])
                    for correct, counted in zip(matches.correct, matches.counted, strict=True)
                ],
                axis=0,
            )
    return result


def _interpolated(correct: np.ndarray, counted: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Mean precision at 101 recalls: (draws, M) weights of what is correct and counts at all."""
    if not correct.shape[1]:
        return np.zeros(len(correct))
    found = correct.cumsum(axis=1)
    # COCOeval's own guard against no detection that counts.
    precision = found / (counted.cumsum(axis=1) + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = found / objects[:, None]
    thresholds = np.linspace(0, 1, 101)
    means = np.empty(len(correct))
    for i, (r, p) in enumerate(zip(recall, precision, strict=True)):
        places = np.searchsorted(r, thresholds, side="left")
        means[i] = p[places[places < len(p)]].sum() / len(thresholds)
    return means


class RunMatches:
    """The matches of runs' detections with the test data they were evaluated on."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self._truths: dict[str, tuple[COCO, list[str]]] = {}

    def read(self, outcome: Outcome) -> list[Matches]:
        """
        Raises:
            UserError: the detections are not there, or do not give the AP of the run's summary.
        """
        folder = outcome.run.folder / DETECTIONS
        if self.metric.startswith(EMA):
            folder = folder / EMA
        path = folder / PREDICTIONS
        if not path.is_file():
            raise UserError(f"{outcome.run.name} kept no detections ({path})")
        truth, classes = self._truth(outcome)
        with contextlib.redirect_stdout(io.StringIO()):
            found = load_detections(truth, json.loads(path.read_text(encoding="utf-8")))
            evaluation = COCOeval(truth, found, "bbox")
            evaluation.evaluate()
        matches = _matches(evaluation, self.metric.removeprefix(EMA), classes)
        (again,) = average_precision(matches, np.ones((1, len(matches[0].objects))))
        if not abs(again - outcome.scores[self.metric]) < 0.01:
            raise UserError(
                f"the detections of {outcome.run.name} give {self.metric} {again:.2f}, its summary "
                f"{outcome.scores[self.metric]:.2f}: they or the test data have changed"
            )
        return matches

    def _truth(self, outcome: Outcome) -> tuple[COCO, list[str]]:
        cfg = OmegaConf.create(outcome.run.settings)
        name = registered_name(cfg.dataloader.test.dataset)
        if name not in self._truths:
            truth = build_evaluator(dataset=name).truth
            # In the order of COCOeval, which is not that of the file.
            classes = truth.loadCats(sorted(truth.getCatIds()))
            self._truths[name] = truth, [c["name"] for c in classes]
        return self._truths[name]


def _matches(evaluation: COCOeval, metric: str, classes: Sequence[str]) -> list[Matches]:
    """Of each class that the metric is about, from COCOeval's matching of each image."""
    parameters = evaluation.params
    size = parameters.areaRngLbl.index(_SIZES.get(metric, "all"))
    overlaps = np.isclose(parameters.iouThrs[:, None], [_IOUS.get(metric, parameters.iouThrs)])
    overlaps = overlaps.reshape(len(parameters.iouThrs), -1).any(axis=1)
    images = len(parameters.imgIds)
    found = []
    for k, name in enumerate(classes):
        if metric not in METRICS and metric != f"AP-{name}":
            continue
        start = (k * len(parameters.areaRng) + size) * images
        found.append(_of_images(evaluation.evalImgs[start : start + images], overlaps))
    return found


def _of_images(per_image: Sequence[Mapping | None], overlaps: np.ndarray) -> Matches:
    known = [(i, e) for i, e in enumerate(per_image) if e is not None]
    objects = np.zeros(len(per_image), dtype=np.int64)
    for i, e in known:
        objects[i] = np.count_nonzero(np.asarray(e["gtIgnore"]) == 0)
    empty = np.zeros((len(overlaps), 0))
    scores = np.concatenate([np.zeros(0), *(e["dtScores"] for _, e in known)])
    # Of equal scores the earlier image's is first, as in COCOeval.
    order = np.argsort(-scores, kind="mergesort")
    images = np.concatenate(
        [np.zeros(0, dtype=np.int64), *(np.full(len(e["dtScores"]), i) for i, e in known)]
    )
    matched = np.concatenate([empty, *(e["dtMatches"] for _, e in known)], axis=1) > 0
    ignored = np.concatenate([empty, *(e["dtIgnore"] for _, e in known)], axis=1) > 0
    rows = np.ix_(overlaps, order)
    return Matches(images[order], matched[rows], ~ignored[rows], objects)


def image_intervals(
    outcomes: Sequence[Outcome],
    results: Sequence[CellResult],
    *,
    baseline: str,
    metric: str,
    draws: int,
) -> tuple[dict[str, tuple[float, float]], str]:
    """The 95 % interval of each cell's difference to the baseline over the test images.

    Args:
        draws: how often the images are drawn; 0: there are no intervals.

    Returns:
        The intervals by the cell's name, and why there are none, if so.
    """
    pairs = {r.cell.name: set(r.differences) for r in results if r.differences}
    if not draws or not pairs:
        return {}, ""
    needed = set().union(*pairs.values())
    reader = RunMatches(metric)
    values: dict[tuple[str, int], np.ndarray] = {}
    weights = None
    try:
        for outcome in outcomes:
            key = (outcome.run.cell.name, outcome.run.seed)
            if outcome.status != DONE or metric not in outcome.scores:
                continue
            if key[1] not in pairs.get(key[0], needed if key[0] == baseline else ()):
                continue
            matches = reader.read(outcome)
            images = len(matches[0].objects)
            if weights is None:
                weights = draw_images(images, draws)
            if weights.shape[1] != images:
                raise UserError(f"{outcome.run.name} has other test images than the others")
            values[key] = average_precision(matches, weights)
    # Whatever there is to say about the images, the seeds' table is not lost by it.
    except Exception as error:
        return {}, f"No interval over the test images: {first_line(error)}."
    intervals = {}
    for name, seeds in pairs.items():
        differences = np.mean([values[name, s] - values[baseline, s] for s in seeds], axis=0)
        low, high = np.nanpercentile(differences, [2.5, 97.5])
        intervals[name] = (float(low), float(high))
    return intervals, ""

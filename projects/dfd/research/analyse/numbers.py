"""From what a pass has counted to the numbers of the analysis, as plain data for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..output import without_nan
from ..resampling import draw_images
from .collect import DETECTED, FALSE, GROUPS, MISSED, OUTCOMES, LevelTally, Tally
from .matching import SIZES, size_classes
from .statistics import auc, auc_samples, interval, ratio_samples

REGIONS = (*SIZES, "background")
ALL = "all levels"
SAME_KIND = "all levels, same class and size"
SAME_IMAGE = "all levels, same image"
SAME_BOTH = "all levels, same image, class and size"
_SAMPLES = 1000


def summarise(tally: Tally, *, strides: Sequence[int]) -> dict[str, Any]:
    """Every number about one checkpoint; None where there is nothing to measure.

    Args:
        strides: pixels per cell of each level, in the order of ``tally.levels``.
    """
    draws = draw_images(len(tally.outcomes), _SAMPLES)
    # Resampling a single image says nothing about others.
    draws = draws if len(tally.outcomes) > 1 else draws[:0]
    numbers = {
        "iteration": tally.iteration,
        "levels": {name: _level(level) for name, level in tally.levels.items()},
        "errors": {
            "counts": _counts(tally),
            "disparity": _disparity_of_groups(tally),
            "auc": _aucs(tally, draws),
            "high_share": _high_shares(tally, strides, draws),
        },
    }
    return without_nan(numbers)


def _level(level: LevelTally) -> dict[str, Any]:
    """Distribution, object sizes, regions, and the likeness to the last checkpoint's map."""
    histogram = level.histogram
    low, high = (_ratio(*region) for region in level.regions)
    correlations = np.array(level.correlations)
    finite = correlations[np.isfinite(correlations)]
    return {
        "cells": histogram.count,
        "mean": histogram.mean,
        "median": histogram.quantile(0.5),
        "q90": histogram.quantile(0.9),
        "q99": histogram.quantile(0.99),
        "high": {
            "share_of_cells": _ratio(level.regions[1, 1], level.regions[:, 1].sum()),
            "mean": high,
            "mean_of_low": low,
            "ratio": _ratio(high, low),
        },
        "sizes": {
            region: {"mean": _ratio(*level.sizes[k]), "cells": int(level.sizes[k, 1])}
            for k, region in enumerate(REGIONS)
        },
        "rank_correlation_with_last": float(finite.mean()) if len(finite) else math.nan,
    }


def _counts(tally: Tally) -> dict[str, Any]:
    """Labels and false detections, of all sizes and of each."""
    kinds, sizes = _joined(tally)[1:3]
    return {
        outcome: {
            "all": int((kinds == kind).sum()),
            **{size: int(((kinds == kind) & (sizes == k)).sum()) for k, size in enumerate(SIZES)},
        }
        for kind, outcome in enumerate(OUTCOMES)
    }


def _joined(tally: Tally) -> tuple[np.ndarray, ...]:
    """All images' boxes: (B,) image, kind, size, class, and (B, L + 1) mean disparity."""
    images = [np.full(len(o.boxes), i) for i, o in enumerate(tally.outcomes)]
    kinds = np.concatenate([outcome.kinds for outcome in tally.outcomes])
    sizes = np.concatenate([size_classes(outcome.boxes) for outcome in tally.outcomes])
    classes = np.concatenate([outcome.classes for outcome in tally.outcomes])
    return np.concatenate(images), kinds, sizes, classes, np.concatenate(tally.means)


def _disparity_of_groups(tally: Tally) -> dict[str, dict[str, float]]:
    """Mean over the boxes of each outcome, and over the cells of the background."""
    _, kinds, _, _, means = _joined(tally)
    cells = np.sum(tally.cells, axis=0)[:, GROUPS.index("background")]
    cells = np.concatenate([cells.sum(axis=0, keepdims=True), cells])
    rows = {}
    for column, name in enumerate((ALL, *tally.levels)):
        values = means[:, column]
        rows[name] = {
            outcome: _ratio(*_finite_total(values[kinds == kind]))
            for kind, outcome in enumerate(OUTCOMES)
        }
        rows[name]["background"] = _ratio(cells[column, 2], cells[column, 0])
    return rows


def _aucs(tally: Tally, draws: np.ndarray) -> dict[str, dict[str, Any]]:
    """How well disparity inside a labelled box tells a missed object from a detected one."""
    images, kinds, sizes, classes, means = _joined(tally)
    labels = kinds != FALSE
    everything = np.ones_like(labels)
    same_kind = classes * len(SIZES) + sizes
    cases = {
        ALL: (0, everything, None),
        SAME_KIND: (0, everything, same_kind),
        SAME_IMAGE: (0, everything, images),
        SAME_BOTH: (0, everything, images * (same_kind.max(initial=0) + 1) + same_kind),
    }
    cases |= {name: (column, everything, None) for column, name in enumerate(tally.levels, 1)}
    cases |= {f"{ALL}, {size}": (0, sizes == k, None) for k, size in enumerate(SIZES)}
    rows = {}
    for name, (column, chosen, strata) in cases.items():
        values = means[:, column]
        use = labels & chosen & np.isfinite(values)
        case = {"strata": None if strata is None else strata[use]}
        missed = kinds[use] == MISSED
        samples = auc_samples(
            values[use],
            missed,
            images=images[use],
            draws=draws,
            within_images=name in (SAME_IMAGE, SAME_BOTH),
            **case,
        )
        rows[name] = {
            "auc": float(auc(values[use], missed, **case)[0]),
            "interval": interval(samples),
            "missed": int(missed.sum()),
            "detected": int((~missed).sum()),
        }
    return rows


def _high_shares(
    tally: Tally, strides: Sequence[int], draws: np.ndarray
) -> dict[str, dict[str, Any]]:
    """The share of each group's area where disparity is above its image's mean.

    Levels are joined by area, so that each of them counts alike.
    """
    cells = np.stack(tally.cells)[..., :2]  # (images, L, GROUPS, 2)
    area = (cells * np.array(strides, dtype=float)[:, None, None] ** 2).sum(axis=1)
    rows = {}
    for name, counts in zip((ALL, *tally.levels), (area, *np.moveaxis(cells, 1, 0)), strict=True):
        total = counts.sum(axis=0)
        rows[name] = {group: _ratio(total[k, 1], total[k, 0]) for k, group in enumerate(GROUPS)}
        samples = {
            group: ratio_samples(counts[:, k, 1], counts[:, k, 0], draws)
            for k, group in enumerate(GROUPS)
        }
        for other in ("image", OUTCOMES[DETECTED]):
            rows[name][f"errors_minus_{other}"] = {
                "value": rows[name]["errors"] - rows[name][other],
                "interval": interval(samples["errors"] - samples[other]),
            }
    return rows


def _finite_total(values: np.ndarray) -> tuple[float, int]:
    finite = values[np.isfinite(values)]
    return float(finite.sum()), len(finite)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan

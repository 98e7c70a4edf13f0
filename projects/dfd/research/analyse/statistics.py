"""Statistics of disparity, of ranks and over resampled images: pure functions."""

from __future__ import annotations

import warnings

import numpy as np
from scipy import stats

# The histogram's bins: so many to a factor of ten, from 1e-8 to 1e8; the first and the last bin
# take what lies outside.
_PER_DECADE = 200
_LOWEST, _HIGHEST = -8, 8
# Values resampled at once.
_CHUNK = 2_000_000


class LogHistogram:
    """The distribution of any number of values >= 0 in constant memory.

    Mean and total are exact; a quantile is exact to 1.2 %, the width of a bin.
    """

    def __init__(self) -> None:
        bins = (_HIGHEST - _LOWEST) * _PER_DECADE
        self.counts = np.zeros(bins)
        self.sums = np.zeros(bins)
        self._smallest, self._largest = np.inf, 0.0

    def add(self, values: np.ndarray) -> None:
        flat = values.ravel().astype(np.float64)
        logs = np.log10(np.maximum(flat, 10.0**_LOWEST))
        bins = ((logs - _LOWEST) * _PER_DECADE).astype(int).clip(0, len(self.counts) - 1)
        self.counts += np.bincount(bins, minlength=len(self.counts))
        self.sums += np.bincount(bins, weights=flat, minlength=len(self.counts))
        self._smallest = min(self._smallest, float(flat.min(initial=np.inf)))
        self._largest = max(self._largest, float(flat.max(initial=0.0)))

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.count) if self.count else float("nan")

    def quantile(self, fraction: float) -> float:
        """The value that a fraction of the values does not exceed; nan if there are none."""
        if not self.count:
            return float("nan")
        position = np.interp(
            fraction * self.count,
            np.concatenate([[0], self.counts.cumsum()]),
            np.arange(len(self.counts) + 1),
        )
        value = 10 ** (_LOWEST + position / _PER_DECADE)
        return float(np.clip(value, self._smallest, self._largest))

    def density(self, bins_per_decade: int) -> tuple[np.ndarray, np.ndarray]:
        """Values and the share of all values in the wider bin around each, where there are any."""
        width = _PER_DECADE // bins_per_decade
        shares = self.counts.reshape(-1, width).sum(axis=1) / max(self.count, 1)
        centres = 10 ** (_LOWEST + (np.arange(len(shares)) + 0.5) / bins_per_decade)
        filled = np.flatnonzero(shares)
        span = slice(filled[0], filled[-1] + 1) if len(filled) else slice(0)
        return centres[span], shares[span]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, of two arrays of one shape; nan if either is constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return float(stats.spearmanr(a, b, axis=None).statistic)


def auc(
    values: np.ndarray,
    positive: np.ndarray,
    *,
    strata: np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """How often a positive case has the higher value of the two, ties counting half.

    Args:
        values: (n,).
        positive: (n,) bool.
        strata: (n,) int: only cases of the same stratum are compared; None: all.
        weights: (R,n), how often each case counts in each of R samples; None: once, in one.

    Returns:
        (R,): 0.5 if the values say nothing; nan where there is nothing to compare.
    """
    weights = np.ones((1, len(values))) if weights is None else weights
    if not len(values):
        return np.full(len(weights), np.nan)
    strata = np.zeros(len(values), int) if strata is None else strata
    order = np.lexsort((values, strata))
    values, strata = values[order], strata[order]
    new_stratum = np.concatenate([[True], np.diff(strata) != 0])
    # A group is the cases of one value in one stratum.
    starts = np.flatnonzero(new_stratum | np.concatenate([[True], np.diff(values) != 0]))
    first_group = np.maximum.accumulate(np.where(new_stratum[starts], np.arange(len(starts)), 0))
    weights = weights[:, order]
    above = np.add.reduceat(weights * positive[order], starts, axis=1)
    other = np.add.reduceat(weights * ~positive[order], starts, axis=1)
    below = np.cumsum(other, axis=1) - other
    below = below - below[:, first_group]
    wins = (above * (below + other / 2)).sum(axis=1)
    edges = np.flatnonzero(new_stratum[starts])
    pairs = (np.add.reduceat(above, edges, axis=1) * np.add.reduceat(other, edges, axis=1)).sum(1)
    return np.divide(wins, pairs, out=np.full(len(wins), np.nan), where=pairs > 0)


def auc_samples(
    values: np.ndarray,
    positive: np.ndarray,
    *,
    images: np.ndarray,
    draws: np.ndarray,
    strata: np.ndarray | None = None,
    within_images: bool = False,
) -> np.ndarray:
    """``auc`` of the cases in each resampled set of images.

    Args:
        images: (n,) the image that each case lies on.
        draws: (R, images), see ``draw_images``.
        within_images: whether no stratum has cases of two images.
    """
    step = max(1, _CHUNK // max(len(values), 1))
    # A pair counts with the product of its weights. An image that is drawn twice has its own
    # pairs twice, not four times.
    draws = np.sqrt(draws) if within_images else draws
    parts = [
        auc(values, positive, strata=strata, weights=draws[i : i + step][:, images])
        for i in range(0, len(draws), step)
    ]
    return np.concatenate(parts) if parts else np.empty(0)


def ratio_samples(part: np.ndarray, whole: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """(R,): the sum of ``part`` over that of ``whole``, (images,) each, in resampled images."""
    parts, wholes = draws @ part, draws @ whole
    return np.divide(parts, wholes, out=np.full(len(draws), np.nan), where=wholes > 0)


def interval(samples: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of resampled values; None if most of them are nan."""
    finite = samples[np.isfinite(samples)]
    if len(finite) <= len(samples) / 2:
        return None
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)

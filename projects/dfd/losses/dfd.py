"""Disparity Feature Distillation: regions of high and of low disparity, strict and lenient.

From the abstract of "DFD: Distilling the Feature Disparity Differently for Detectors" (ICML 2024):
regions where teacher and student differ by different degrees are treated separately, under
different constraints. Only its abstract was accessible to us; the official repository holds a
README. The equations here are this project's own; docs/method.md gives them with the points that
the abstract leaves open.

Shape shorthand: N images, C channels, H x W cells of one level, K regions.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.utils.logger import log_first_n
from torch import Tensor

from ..distill.disparity import (
    MEASURES,
    SCALES,
    SPLITS,
    ChannelMeans,
    channel_means,
    disparity_map,
    scale_features,
    split_regions,
    zero_outside,
)
from ..errors import UserError
from ..ranges import check_choice, check_count, check_number, check_positive, is_integer, is_number
from .base import FeatureCriterion, LevelFeatures, objectness_of
from .generator import FeatureGenerator

LENIENT = ("tail", "direction", "tolerance", "context", "smooth")
AVERAGES = ("region", "all")


def tail_cost(student: Tensor, teacher: Tensor, delta: float) -> Tensor:
    """Twice the Huber loss, mean over channels: x^2 up to |x| = ``delta``, then a line."""
    return 2 * F.huber_loss(student, teacher, reduction="none", delta=delta).mean(dim=1)


def tolerance_cost(student: Tensor, teacher: Tensor, tolerance: float) -> Tensor:
    """mean_c of the square of what |s - t| exceeds ``tolerance`` by."""
    return F.softshrink(student - teacher, tolerance).square().mean(dim=1)


def direction_cost(means: ChannelMeans) -> Tensor:
    """mean_c of (s' - t)^2 where s' is s given the length of t: |t|^2 / C * 2 (1 - cos(s, t)).

    So it is on the scale of the strict cost, and asks nothing of the student's length.
    """
    _, product, energy, target = means
    # The least length of s bounds the gradient, also beside a long t; and the square root of an
    # exact zero, where t is zero, has an infinite one.
    ratio = target / energy.maximum(1e-12 * target.clamp(min=1))
    return 2 * (target - product * ratio.clamp(min=torch.finfo(ratio.dtype).tiny).sqrt())


def smooth_cost(student: Tensor, teacher: Tensor, valid: Tensor | None, window: int) -> Tensor:
    """mean_c of the square of the mean of s - t over the ``window`` x ``window`` cells around each.

    Of the valid cells there. What changes from cell to cell costs nothing: strict on what is left
    of both maps by a low-pass filter, lenient on the rest.
    """
    settings = {"kernel_size": window, "stride": 1, "padding": window // 2}
    difference = student - teacher  # Zero where it is not valid, see scale_features.
    if valid is None:
        mean = F.avg_pool2d(difference, **settings, count_include_pad=False)
    else:
        difference = zero_outside(difference, valid)
        share = F.avg_pool2d(valid[:, None].to(difference.dtype), **settings)
        # An invalid cell far from any other has no neighbour either; it does not count.
        mean = F.avg_pool2d(difference, **settings) / share.clamp(min=1 / (2 * window**2))
    return mean.square().mean(dim=1)


def _checked_leniency(
    leniency: float | Sequence[float], anneal_iters: int | None
) -> tuple[tuple[float, float], int | None]:
    """The leniency at the start and at the end, and over how many iterations it goes there."""
    pair = isinstance(leniency, Sequence) and not isinstance(leniency, str)
    ends = tuple(leniency) if pair else (leniency, leniency)
    if len(ends) != 2 or not all(is_number(value) and 0 <= value <= 1 for value in ends):
        shown = list(leniency) if pair else leniency
        raise UserError(
            f"DFDLoss(leniency={shown!r}): it must be a number from 0 to 1, or two of them"
        )
    if anneal_iters is None:
        return ends, None
    if not is_integer(anneal_iters) or anneal_iters < 1:
        raise UserError(f"DFDLoss(anneal_iters={anneal_iters!r}): it must be a whole number from 1")
    if not pair:
        raise UserError(
            f"DFDLoss(anneal_iters={anneal_iters!r}, leniency={leniency!r}): there is nothing to "
            "anneal: give the leniency at the start and at the end, such as [0, 1]"
        )
    return ends, anneal_iters


class DFDLoss(FeatureCriterion):
    """The disparity-weighted loss of one level; see docs/method.md.

    With s and t the scaled features and d = mean_c (s - t)^2 the disparity (detached; or another
    ``measure``), the valid cells of each image are split into K regions by d, and

        L = weight * sum_k region_weight_k * mean_{cells u of region k} cost_k(u),

    where cost_k is mean_c (s - t)^2 (strict), or one of the lenient costs. "context" costs
    (G(s with the lenient cells set to zero) - t)^2 with a learnt G = conv3x3, ReLU, conv3x3, which
    asks that the teacher can be told from the surroundings, not that the cell itself is matched
    (a reconstruction as in MGD, Yang et al., ECCV 2022, but of the lenient region, not of random
    cells).
    """

    needs_boxes = False

    def __init__(
        self,
        *,
        weight: float = 5.0,
        scale: str = "channel",
        measure: str = "squared",
        num_regions: int = 2,
        split: str = "mean",
        thresholds: Sequence[float] | None = None,
        lenient_on: str | Sequence[int] = "high",
        lenient: str = "direction",
        leniency: float | Sequence[float] = (0.0, 1.0),
        anneal_iters: int | None = None,
        delta: float = 1.0,
        tolerance: float = 0.5,
        window: int = 3,
        certainty: bool = False,
        region_weights: Sequence[float] | None = None,
        average: str = "region",
        sync_statistics: bool = False,
        channels: int | None = None,
    ) -> None:
        """
        Args:
            weight: multiplies the loss; >= 0.
            scale: "channel", "level" or "none"; see ``disparity.scale_features``.
            measure: of the disparity by which cells are split: "squared", "cosine" or "relative";
                see ``disparity.disparity_map``.
            num_regions: K >= 1.
            split: "mean" or "quantile"; see ``disparity.split_regions``.
            thresholds: K - 1 rising numbers. None: 2k/K times the mean, or the quantiles k/K.
            lenient_on: which regions are lenient: "high" (the one of highest disparity: do not
                force what the student cannot do yet), "low" (do not waste force on what it can),
                "all", "none", or a list of region numbers, 0 the lowest.
            lenient: "tail", "direction", "tolerance", "context" or "smooth".
            leniency: the cost of lenient cells is (1 - leniency) strict + leniency lenient; in
                [0, 1]. Two numbers: it goes linearly from the first to the second. By default a
                training begins strict everywhere and ends lenient.
            anneal_iters: over so many iterations; None: over the whole training. Where its length
                is not known (``LevelFeatures.max_iter``) the leniency is the second.
            delta: where the tail begins, in units of the scaled features; > 0.
            tolerance: what is forgiven, in the same units; >= 0.
            window: side of the square of cells that "smooth" averages over; odd, >= 3.
            certainty: lenient only where the teacher is not sure: the leniency of a cell is
                multiplied by 1 - m, m the teacher's objectness (``distill.objectness``).
            region_weights: K numbers >= 0, lowest region first. None: 1/K each under
                ``average="region"``, 1 under "all".
            average: "region": each region is averaged over its own cells, so that neither drowns
                in the other's area; "all": over all valid cells.
            sync_statistics: under several processes, take the statistics of ``scale`` over the
                batches of all of them; False: each process over its own. With it s, t, d and the
                regions are those of one process with the whole batch. The means over cells stay
                each process's own, and the losses are averaged over the processes, which is the
                loss of the whole batch where all have as many valid cells (in each region under
                ``average="region"``). No effect in one process.
            channels: C, for "context"; the head fills it in.

        Raises:
            UserError: a value outside its range.
        """
        super().__init__()
        self.weight = check_number("DFDLoss: weight", weight)
        self.scale = check_choice("DFDLoss: scale", scale, SCALES)
        self.measure = check_choice("DFDLoss: measure", measure, MEASURES)
        self.num_regions = check_count("DFDLoss: num_regions", num_regions, 1)
        self.split = check_choice("DFDLoss: split", split, SPLITS)
        self.lenient = check_choice("DFDLoss: lenient", lenient, LENIENT)
        self.average = check_choice("DFDLoss: average", average, AVERAGES)
        self.tolerance = check_number("DFDLoss: tolerance", tolerance)
        self.delta = check_positive("DFDLoss: delta", delta)
        self.window = check_count("DFDLoss: window", window, 3)
        if window % 2 == 0:
            raise UserError(f"DFDLoss: window is {window}; it must be an odd number")
        self.needs_objectness = certainty
        self.sync_statistics = sync_statistics
        self.leniency, self.anneal_iters = _checked_leniency(leniency, anneal_iters)
        self.thresholds = self._check_thresholds(thresholds)
        self.region_weights = self._check_region_weights(region_weights)
        self.lenient_regions = self._check_lenient_regions(lenient_on)
        if certainty and not (self.lenient_regions and any(self.leniency)):
            raise UserError(
                f"DFDLoss(certainty=True, lenient_on={lenient_on!r}, leniency={leniency!r}): no "
                "cell is lenient, so certainty would do nothing"
            )
        self.region_names = (
            ["low", "high"] if num_regions == 2 else [f"r{k}" for k in range(num_regions)]
        )
        self.generator: FeatureGenerator | None = None
        if channels is not None:
            self.set_channels(channels)

    def _leniency(self, level: LevelFeatures) -> float:
        first, last = self.leniency
        if first == last:
            return first
        over = level.max_iter if self.anneal_iters is None else self.anneal_iters
        if over is None:
            log_first_n(
                logging.WARNING,
                f"DFDLoss(leniency={list(self.leniency)}) goes over the whole training, whose "
                f"length is not known here: it stays at {last:g}. Set max_iter of the "
                "DistilledDetector, or anneal_iters",
                name=__name__,
            )
            return last
        done = min(1.0, level.iteration / over)
        return (1 - done) * first + done * last

    def _check_thresholds(self, thresholds: Sequence[float] | None) -> list[float]:
        regions = self.num_regions
        if thresholds is None:
            unit = 2 if self.split == "mean" else 1
            return [unit * k / regions for k in range(1, regions)]
        thresholds = [float(x) for x in thresholds]
        rising = all(a < b for a, b in zip(thresholds, thresholds[1:], strict=False))
        inside = all(x > 0 and (self.split == "mean" or x < 1) for x in thresholds)
        if len(thresholds) != regions - 1 or not rising or not inside:
            raise UserError(
                f"DFDLoss(thresholds={thresholds}, split={self.split!r}): needs {regions - 1} "
                f"rising numbers above 0 (below 1 for quantiles) for {regions} regions"
            )
        return thresholds

    def _check_region_weights(self, weights: Sequence[float] | None) -> list[float]:
        if weights is None:
            return [1 / self.num_regions if self.average == "region" else 1.0] * self.num_regions
        weights = [float(x) for x in weights]
        if len(weights) != self.num_regions or min(weights) < 0 or max(weights) == 0:
            raise UserError(
                f"DFDLoss(region_weights={weights}): needs {self.num_regions} numbers >= 0, "
                "not all of them 0"
            )
        return weights

    def _check_lenient_regions(self, lenient_on: str | Sequence[int]) -> frozenset[int]:
        regions = range(self.num_regions)
        words = {"high": regions[-1:], "low": regions[:1], "all": regions, "none": ()}
        chosen = words.get(lenient_on) if isinstance(lenient_on, str) else lenient_on
        if chosen is None or any(k not in regions for k in chosen):
            raise UserError(
                f"DFDLoss(lenient_on={lenient_on!r}): it must be one of {', '.join(words)}, or a "
                f"list of region numbers from 0 to {self.num_regions - 1}"
            )
        if self.lenient == "context" and len(set(chosen)) == self.num_regions:
            raise UserError(
                f"DFDLoss(lenient='context', lenient_on={lenient_on!r}): no region would be left "
                "to reconstruct from, and nothing would be learnt"
            )
        return frozenset(chosen)

    def set_channels(self, channels: int) -> None:
        needed = self.lenient == "context" and self.lenient_regions and any(self.leniency)
        if needed and self.generator is None:
            self.generator = FeatureGenerator(channels)

    def forward(self, level: LevelFeatures) -> Tensor:
        valid = level.valid
        s, t = scale_features(
            level.student, level.teacher, valid, self.scale, sync=self.sync_statistics
        )
        means = channel_means(s, t)
        with torch.no_grad():
            squared = self.measure == "squared"
            disparity = means.difference.detach() if squared else disparity_map(s, t, self.measure)
            regions = split_regions(disparity, valid, self.split, self.thresholds)
        cost = self._cost(s, t, means, regions, level)

        num_valid = (regions >= 0).sum()
        stats = {"disparity": disparity.mul(regions >= 0).sum() / num_valid.clamp(min=1)}
        total, weights = cost.new_zeros(()), cost.new_zeros(())
        for k, name in enumerate(self.region_names):
            mask = regions == k
            size = mask.sum()
            cells = size if self.average == "region" else num_valid
            mean = torch.where(mask, cost, 0).sum() / cells.clamp(min=1)
            total = total + self.region_weights[k] * mean
            weights = weights + self.region_weights[k] * (size > 0)
            stats[f"share_{name}"] = size / num_valid.clamp(min=1)
            stats[f"term_{name}"] = mean.detach()
        self.stats = stats
        if self.average == "region":
            # A level of a few cells may have no high region: its weight goes to the others.
            total = total * (sum(self.region_weights) / weights.clamp(min=1e-12))
        return self.weight * total

    def _cost(
        self, s: Tensor, t: Tensor, means: ChannelMeans, regions: Tensor, level: LevelFeatures
    ) -> Tensor:
        """What each cell costs under its region's constraint, (N,H,W)."""
        leniency: float | Tensor = self._leniency(level)
        strict = means.difference
        # A generator gets its gradient, if one of zeros, at any leniency: DDP waits for it.
        if not self.lenient_regions or (leniency == 0 and self.generator is None):
            return strict
        lenient = sum(regions == k for k in self.lenient_regions).bool()
        cost = (
            direction_cost(means)
            if self.lenient == "direction"
            else self._lenient_cost(s, t, lenient, level.valid)
        )
        if self.needs_objectness:
            leniency = leniency * (1 - objectness_of(level, "DFDLoss(certainty=True)"))
        return torch.where(lenient, torch.lerp(strict, cost, leniency), strict)

    def _lenient_cost(self, s: Tensor, t: Tensor, lenient: Tensor, valid: Tensor | None) -> Tensor:
        """The lenient cost, (N,H,W), of which only the cells that are ``lenient`` count."""
        if self.lenient == "tail":
            return tail_cost(s, t, self.delta)
        if self.lenient == "tolerance":
            return tolerance_cost(s, t, self.tolerance)
        if self.lenient == "smooth":
            return smooth_cost(s, t, valid, self.window)
        if self.generator is None:
            raise UserError("DFDLoss(lenient='context') needs channels=C when used without a head")
        return disparity_map(self.generator(s, lenient.unsqueeze(1), valid), t)

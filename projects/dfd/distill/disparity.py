"""How far student and teacher are apart, and where: the pure functions of DFD.

The equations are this project's own; see docs/method.md.

Shape shorthand: N images, C channels, H x W cells of one level. ``valid`` is (N,H,W) bool, or
None where every cell is valid. Everything is computed in the precision of its input; callers pass
fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor

from .processes import sum_over_processes

SCALES = ("channel", "level", "none")
MEASURES = ("squared", "cosine", "relative")
SPLITS = ("mean", "quantile")
_EPS = 1e-6


def zero_outside(features: Tensor, valid: Tensor | None) -> Tensor:
    """(N,C,H,W) features with zeros in place of what is not valid, whatever stood there.

    Before anything is computed, not after: a ``where()`` behind a square or a product chooses in
    the forward pass alone, and gives NaN for a gradient where the part not chosen is infinite.
    """
    return features if valid is None else features.masked_fill(~valid.unsqueeze(1), 0)


def _moments(
    x: Tensor, valid: Tensor | None, per_channel: bool, sync: bool
) -> tuple[Tensor, Tensor]:
    """Mean and variance (biased) over the valid cells, keeping x's dimensions.

    ``x`` is zero outside of them.
    """
    dims = (0, 2, 3) if per_channel else (0, 1, 2, 3)
    if valid is None:
        count = x.new_full((), x.numel() / (x.shape[1] if per_channel else 1))
        # Not torch.var_mean, which takes several times as long on a CPU.
        mean = x.mean(dim=dims, keepdim=True)
        variance = (x - mean).square().mean(dim=dims, keepdim=True)
    else:
        mask = valid.unsqueeze(1).to(x.dtype)
        count = mask.sum() * (1 if per_channel else x.shape[1])
        divisor = count.clamp(min=1)
        mean = x.sum(dim=dims, keepdim=True) / divisor
        variance = (((x - mean) * mask) ** 2).sum(dim=dims, keepdim=True) / divisor
    if sync:
        mean, variance = _pool(mean, variance, count)
    return mean, variance


def _pool(mean: Tensor, variance: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over all processes from those of each, over ``count`` values each."""
    # In float64, in which the difference of squares loses nothing that fp32 had.
    m, v = mean.double(), variance.double()
    sums = sum_over_processes(count * torch.stack([torch.ones_like(m), m, v + m.square()]))
    total, first, second = sums[0].clamp(min=1), sums[1], sums[2]
    m = first / total
    return m.to(mean.dtype), (second / total - m.square()).to(mean.dtype)


def _standardise(x: Tensor, valid: Tensor | None, sync: bool) -> Tensor:
    """Zero mean and unit variance for each channel over the valid cells."""
    if valid is None and not sync and x[:, 0].numel() > 1:
        # The same in one pass each way; it refuses a single value per channel.
        return F.batch_norm(x, None, None, training=True, eps=_EPS**2)
    mean, variance = _moments(x, valid, True, sync)
    # The square root of an exact zero has an infinite gradient.
    return (x - mean) / variance.clamp(min=_EPS**2).sqrt()


def _spread(x: Tensor, valid: Tensor | None, sync: bool) -> Tensor:
    """The standard deviation over all channels and valid cells; 1 if that is but rounding."""
    mean, variance = _moments(x, valid, False, sync)
    # A constant has no scale. Divided by a small number instead, it would make a loss of 1e12.
    varies = variance > _EPS**2 * (1 + mean.square())
    return torch.where(varies, variance, 1).sqrt()


def scale_features(
    student: Tensor, teacher: Tensor, valid: Tensor | None, scale: str, sync: bool = False
) -> tuple[Tensor, Tensor]:
    """Bring both sides to a scale on which a difference means the same on every level.

    Args:
        student, teacher: (N,C,H,W).
        scale: "channel": each channel of each side gets zero mean and unit variance over the
            valid cells of the batch, so scale and offset say nothing.
            "level": both sides are divided by one number, the standard deviation of the teacher
            on this level, so offsets and the energy of channels count. A level on which the
            teacher is constant is left as it is.
            "none": as they are.
        sync: take the statistics over the batches of all processes, all of which must call this;
            False: over this process's own batch.

    Returns:
        s, t: (N,C,H,W), finite where not valid whatever was there. Gradients flow through the
        student's own statistics, with ``sync`` also those of the other processes' losses.
    """
    sync = sync and comm.get_world_size() > 1
    student, teacher = zero_outside(student, valid), zero_outside(teacher, valid)
    if scale == "none":
        return student, teacher
    if scale == "level":
        std = _spread(teacher, valid, sync)
        return student / std, teacher / std
    if scale == "channel":
        return _standardise(student, valid, sync), _standardise(teacher, valid, sync)
    raise ValueError(f"scale is {scale!r}; it must be one of {', '.join(SCALES)}")


def disparity_map(student: Tensor, teacher: Tensor, measure: str = "squared") -> Tensor:
    """How far apart two features are at each cell: (N,C,H,W) each to (N,H,W).

    Args:
        measure: "squared": the mean over channels of (s - t)^2. Under ``scale="channel"`` its mean
            over all cells is 2 (1 - r), with r the mean over channels of the Pearson correlation
            of student and teacher.
            "cosine": 1 - cos(s, t), from 0 to 2, which knows nothing of lengths.
            "relative": the squared one over the energy of both, sum_c (s^2 + t^2), from 0 to 2:
                where features are long, a difference of the same length is less.
    """
    if measure == "squared":
        return (student - teacher).square().mean(dim=1)
    if measure == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=1)
    if measure == "relative":
        energy = (student.square() + teacher.square()).mean(dim=1)
        return (student - teacher).square().mean(dim=1) / energy.clamp(min=_EPS**2)
    raise ValueError(f"measure is {measure!r}; it must be one of {', '.join(MEASURES)}")


def scale_and_measure(criterion: object) -> tuple[str, str]:
    """How the disparity of a criterion is shown: by its own scale and measure, where it has them.

    A criterion of another kind may mean anything by these names, a factor, say; it is shown at
    "level" and "squared".
    """
    found = []
    for name, choices, default in (("scale", SCALES, "level"), ("measure", MEASURES, "squared")):
        value = getattr(criterion, name, None)
        found.append(value if isinstance(value, str) and value in choices else default)
    return found[0], found[1]


class ChannelMeans(NamedTuple):
    """Means over channels, (N,H,W) each: of (s - t)^2, s t, s^2 and t^2."""

    difference: Tensor
    product: Tensor
    student: Tensor
    teacher: Tensor


def channel_means(student: Tensor, teacher: Tensor) -> ChannelMeans:
    """The four of (N,C,H,W) features, with one pass over these for all their gradients.

    Autograd's own would read and write the features three times as often, which is most of the
    time of a loss on a CPU.
    """
    return ChannelMeans(*_ChannelMeans.apply(student, teacher))


class _ChannelMeans(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(student, teacher)
        products = student - teacher
        means = [torch.mul(products, products, out=products).mean(dim=1)]
        for a, b in ((student, teacher), (student, student), (teacher, teacher)):
            means.append(torch.mul(a, b, out=products).mean(dim=1))
        return tuple(means)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, difference: Tensor, product: Tensor, student: Tensor, teacher: Tensor
    ) -> tuple[Tensor | None, ...]:
        s, t = ctx.saved_tensors
        across = ((product - 2 * difference) / s.shape[1]).unsqueeze(1)
        gradients = [
            (x * (2 / x.shape[1] * (difference + own)).unsqueeze(1)).addcmul_(other, across)
            if needed
            else None
            for x, own, other, needed in zip(
                (s, t), (student, teacher), (t, s), ctx.needs_input_grad, strict=True
            )
        ]
        return tuple(gradients)


def mean_of_blocks(x: Tensor, valid: Tensor | None, size: int) -> tuple[Tensor, Tensor | None]:
    """(N,C,H,W) averaged over blocks of ``size`` x ``size`` cells, of those that are valid.

    The last block of a row or column may be smaller. Returns the means, 0 where a block holds no
    valid cell, and which blocks (N,H/size,W/size) hold one; None: all.
    """
    settings = {"kernel_size": size, "ceil_mode": True, "count_include_pad": False}
    if valid is None:
        return F.avg_pool2d(x, **settings), None
    share = F.avg_pool2d(valid[:, None].to(x.dtype), **settings)
    mean = F.avg_pool2d(zero_outside(x, valid), **settings) / share.clamp(min=_EPS)
    return mean, share[:, 0] > 0


def split_regions(
    disparity: Tensor, valid: Tensor | None, split: str, thresholds: Sequence[float]
) -> Tensor:
    """Split the valid cells of each image into regions of rising disparity.

    Args:
        disparity: (N,H,W), not negative.
        split: "mean": region k begins above ``thresholds[k-1]`` times the image's mean disparity.
            "quantile": it begins above that quantile of the image's disparity.
        thresholds: K - 1 rising numbers for K regions; in (0, 1) for "quantile".

    Returns:
        (N,H,W) int64: the region of each cell, 0 (lowest) to K - 1, and -1 where not valid.
    """
    flat = disparity.flatten(1)
    if valid is not None:
        flat = flat.masked_fill(~valid.flatten(1), float("nan"))
    # Filled on the device: a list copied to it would have to wait for it.
    levels = flat.new_empty(len(thresholds))
    for level, threshold in zip(levels, thresholds, strict=True):
        level.fill_(threshold)
    if split == "mean":
        bounds = flat.nanmean(dim=1)[None, :] * levels[:, None]
    elif split == "quantile":
        bounds = torch.nanquantile(flat, levels, dim=1)
    else:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    # bounds: (K-1, N). A comparison with the NaN of an invalid cell is False.
    regions = (flat[None] > bounds[:, :, None]).sum(dim=0).view_as(disparity)
    return regions if valid is None else regions.masked_fill(~valid, -1)

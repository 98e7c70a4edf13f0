"""The plots and pictures of an analysis, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from ..output import png
from .collect import DETECTED, FALSE, GROUPS, MISSED, OUTCOMES, Example, Tally
from .numbers import ALL, REGIONS

_DISPARITY = "disparity d"
# Colour and line of labels and false detections, which differ without the colour too.
_KINDS = {DETECTED: ("#56b4e9", "-"), MISSED: ("#e6001f", "-"), FALSE: ("#ffb000", "--")}
_SHADES = {"small": "#9ecae1", "medium": "#4292c6", "large": "#08519c", "background": "#a6a6a6"}
_BINS_PER_DECADE = 20


def _level_colours(names: Sequence[str]) -> dict[str, Any]:
    shades = matplotlib.colormaps["plasma"].resampled(len(names) + 1)
    return {name: shades(i) for i, name in enumerate(names)}


def _figure(width: float, height: float, columns: int, rows: int = 1) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e5e5e5")
        ax.set_axisbelow(True)
    return figure, axes


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def draw_distribution(tally: Tally) -> bytes:
    """The histogram of each level."""
    figure, axes = _figure(7, 4.2, 1)
    (ax,) = axes[0]
    for name, colour in _level_colours(list(tally.levels)).items():
        histogram = tally.levels[name].histogram
        ax.plot(*histogram.density(_BINS_PER_DECADE), color=colour, label=name)
    ax.set_xscale("log")
    ax.set_ylim(bottom=0)
    bins = f"share of cells in a bin ({_BINS_PER_DECADE} bins a factor of 10)"
    _label(ax, "Distribution of disparity over cells", f"{_DISPARITY} (log scale)", bins)
    ax.legend(frameon=False, fontsize=9)
    return png(figure)


def draw_sizes(last: dict[str, Any]) -> bytes:
    """Mean disparity by size of object, a group of bars a level."""
    figure, axes = _figure(9, 4, 1)
    ax, names = axes[0, 0], list(last["levels"])
    width = 0.8 / len(REGIONS)
    for k, region in enumerate(REGIONS):
        means = [last["levels"][name]["sizes"][region]["mean"] for name in names]
        places = np.arange(len(names)) + (k - (len(REGIONS) - 1) / 2) * width
        ax.bar(places, _floats(means), width, color=_SHADES[region], label=region)
    ax.set_xticks(range(len(names)), names)
    ax.grid(visible=False, axis="x")
    ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    title = "Cells inside labelled boxes by the box's size at the network's input"
    _label(ax, title, "level", f"mean {_DISPARITY}")
    return png(figure)


def draw_training(checkpoints: Sequence[dict[str, Any]]) -> bytes:
    """How means, contrast, likeness to the last map, and sizes change over the iterations."""
    figure, axes = _figure(12, 7.4, 2, 2)
    names = list(checkpoints[-1]["levels"])
    iterations = [point["iteration"] for point in checkpoints]
    for name, colour in _level_colours(names).items():
        levels = [point["levels"][name] for point in checkpoints]
        series = (
            [level["mean"] for level in levels],
            [level["high"]["ratio"] for level in levels],
            [level["rank_correlation_with_last"] for level in levels],
        )
        for ax, values in zip(axes.flat, series, strict=False):
            ax.plot(iterations, _floats(values), color=colour, marker="o", ms=4, label=name)
    for region in REGIONS:
        values = [point["levels"][names[0]]["sizes"][region]["mean"] for point in checkpoints]
        if any(value is not None for value in values):
            style = {"color": _SHADES[region], "marker": "o", "ms": 4, "label": region}
            axes[1, 1].plot(iterations, _floats(values), **style)
    axes[0, 0].set_yscale("log")
    plain = FuncFormatter(lambda value, place: f"{value:g}")
    axes[0, 0].yaxis.set_major_formatter(plain)
    axes[0, 0].yaxis.set_minor_formatter(plain)
    _label(axes[0, 0], "Mean of each level (log scale)", "iterations", f"mean {_DISPARITY}")
    title = "Contrast: mean of the cells above their image's mean / of the others"
    _label(axes[0, 1], title, "iterations", "high / low")
    title = "Do the hard regions stay? Rank correlation with the last map"
    _label(axes[1, 0], title, "iterations", "Spearman, mean over images")
    _label(axes[1, 1], f"By size of object, on {names[0]}", "iterations", f"mean {_DISPARITY}")
    axes[1, 0].set_ylim(top=1.02)
    for ax in axes.flat:
        ax.set_xlim(left=0)
        ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return png(figure)


def draw_errors(last: dict[str, Any], tally: Tally) -> bytes:
    """Disparity by outcome, its AUC as a sign of a miss, and what of each group is high."""
    figure, axes = _figure(13.5, 4.6, 3)
    left, middle, right = axes[0]
    _draw_outcomes(left, tally)
    _draw_aucs(middle, last["errors"]["auc"])
    shares = last["errors"]["high_share"]
    width = 0.84 / len(GROUPS)
    colours = ["#555", "#a6a6a6", *(_KINDS[kind][0] for kind in range(len(OUTCOMES))), "#8c3b00"]
    for k, (group, colour) in enumerate(zip(GROUPS, colours, strict=True)):
        places = np.arange(len(shares)) + (k - (len(GROUPS) - 1) / 2) * width
        values = _floats([row[group] for row in shares.values()])
        right.bar(places, 100 * np.array(values), width, color=colour, label=group)
    right.set_xticks(range(len(shares)), ["all" if name == ALL else name for name in shares])
    right.grid(visible=False, axis="x")
    right.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    _label(right, "Area above its image's mean disparity", "level", "share of the area (%)")
    return png(figure)


def _draw_outcomes(axes: Axes, tally: Tally) -> None:
    """The mean disparity inside each box, a box plot an outcome."""
    kinds = np.concatenate([outcome.kinds for outcome in tally.outcomes])
    values = np.concatenate(tally.means)[:, 0]
    groups = [values[(kinds == kind) & np.isfinite(values)] for kind in range(len(OUTCOMES))]
    boxes = axes.boxplot(groups, widths=0.55, patch_artist=True, showfliers=False, whis=(5, 95))
    for kind, box in enumerate(boxes["boxes"]):
        box.set_facecolor(_KINDS[kind][0])
    for line in boxes["medians"]:
        line.set_color("black")
    names = [f"{name}\n({len(group)})" for name, group in zip(OUTCOMES, groups, strict=True)]
    axes.set_xticks(range(1, len(OUTCOMES) + 1), names)
    axes.set_ylim(bottom=0)
    title = "Inside boxes (median, quartiles, 5 to 95 %)"
    _label(axes, title, "box (number)", f"mean {_DISPARITY} in the box, all levels")


def _draw_aucs(axes: Axes, rows: dict[str, dict[str, Any]]) -> None:
    known = {name: row for name, row in rows.items() if row["auc"] is not None}
    for y, row in enumerate(known.values()):
        axes.plot(row["auc"], y, marker="D", ms=5, color="#1f4e79")
        if row["interval"] is not None:
            axes.plot(row["interval"], [y, y], color="#1f4e79", linewidth=1.6)
    names = [name.replace(", same", ",\nsame") for name in known]
    axes.set_yticks(range(len(known)), names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0.5, color="#888", linewidth=1, linestyle=":")
    axes.grid(visible=False, axis="y")
    title = "Disparity in a labelled box as a sign of a miss"
    _label(axes, title, "AUC, 95 % interval (0.5: it says nothing)", "")


def _floats(values: Sequence[float | None]) -> list[float]:
    return [np.nan if value is None else value for value in values]


def draw_example(example: Example) -> bytes:
    """An image with its boxes, and the maps of its two finest levels, a row a checkpoint."""
    names = list(example.views[-1][1])[:2]
    height, width = example.image.shape[:2]
    # A map is narrower than its column by the axis' labels.
    tile = (4.0, 3.5 * height / width + 0.45)
    size = (tile[0] * (1 + len(names)) + 0.6, tile[1] * len(example.views) + 0.7)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots(len(example.views), 1 + len(names), squeeze=False)
    # One scale for all maps of the picture; a few extreme cells must not darken the rest.
    shown = np.concatenate([maps[name].ravel() for _, maps, _ in example.views for name in names])
    top = float(np.nanquantile(shown, 0.99)) or 1.0
    for row, (iteration, maps, outcome) in zip(axes, example.views, strict=True):
        row[0].imshow(example.image)
        row[0].set_title(f"after {iteration} iterations: image", fontsize=10)
        for ax, name in zip(row[1:], names, strict=True):
            disparity = maps[name]
            stride = round(height / disparity.shape[0])
            extent = (0, disparity.shape[1] * stride, disparity.shape[0] * stride, 0)
            drawn = ax.imshow(disparity, vmin=0, vmax=top, extent=extent, interpolation="nearest")
            ax.set_title(f"{_DISPARITY} on {name}, mean {np.nanmean(disparity):.2f}", fontsize=10)
        for ax in row:
            _outline(ax, outcome, thin=ax is not row[0])
            ax.set(xlim=(0, width), ylim=(height, 0))
            ax.tick_params(labelsize=7)
        row[0].set_ylabel("y (pixels)", fontsize=8)
    for ax in axes[-1]:
        ax.set_xlabel("x (pixels of the network's input)", fontsize=8)
    figure.colorbar(drawn, ax=axes[:, -1], label=f"{_DISPARITY} (scale ends at the 99 % quantile)")
    handles = [
        Rectangle((0, 0), 1, 1, fill=False, edgecolor=colour, linestyle=line, linewidth=2)
        for colour, line in _KINDS.values()
    ]
    figure.legend(handles, OUTCOMES, loc="outside upper center", ncols=3, frameon=False)
    return png(figure)


def _outline(axes: Axes, outcome: Any, *, thin: bool) -> None:
    """Boxes by what they are; on a map only the errors, so that it stays visible."""
    for (x0, y0, x1, y1), kind in zip(outcome.boxes, outcome.kinds, strict=True):
        if thin and kind == DETECTED:
            continue
        colour, line = _KINDS[int(kind)]
        style = {"edgecolor": colour, "linestyle": line, "linewidth": 1.2 if thin else 1.6}
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **style))

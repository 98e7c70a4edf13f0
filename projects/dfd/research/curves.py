"""The losses of runs over their iterations, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure

from .output import png

_Lines = Sequence[Mapping[str, float]]
_Series = tuple[list[float], list[float]]
_LEVEL = "loss_dfd_"
_STYLES = ("-", "--", ":", "-.")
# A zero that stands in for the levels when there is nothing to distil; not a level.
_IDLE = "loss_dfd_idle"


def loss_curves(
    metrics: Mapping[str, _Lines], *, sum_levels: bool = False, dpi: int = 150
) -> bytes:
    """A PNG of the task losses and, beside it, of the distillation losses if there are any.

    Args:
        metrics: the lines of each run's ``metrics.json``, by what it is called.
        sum_levels: whether a run has one curve of distillation, the sum over its levels.
    """
    task: dict[str, _Series] = {}
    levels: dict[str, _Series] = {}
    for name, lines in metrics.items():
        keys = sorted({key for line in lines for key in line if key.startswith("loss_")})
        task[name] = _series(lines, [key for key in keys if not key.startswith(_LEVEL)])
        distilled = [key for key in keys if key.startswith(_LEVEL) and key != _IDLE]
        if sum_levels and distilled:
            levels[name] = _series(lines, distilled)
            continue
        for key in distilled:
            levels[f"{name}: {key.removeprefix(_LEVEL)}"] = _series(lines, [key])
    columns = 2 if levels else 1
    figure = Figure(figsize=(6 * columns, 3.6), dpi=dpi, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    title = "Task loss (every loss_* but loss_dfd_*)"
    _plot(axes[0], title, task, matplotlib.colormaps["tab10"])
    axes[0].set_ylim(bottom=0)
    if levels:
        # Other colours than the runs', so that neither is taken for the other.
        shades = matplotlib.colormaps["plasma"].resampled(len(levels) + 1)
        colours = matplotlib.colormaps["tab10"] if sum_levels else shades
        what = "all levels" if sum_levels else "each level"
        _plot(axes[1], f"Distillation loss of {what}, weighted; log scale", levels, colours)
        axes[1].set_yscale("log", nonpositive="mask")
    return png(figure)


def _series(lines: _Lines, keys: Sequence[str]) -> _Series:
    """The iterations that logged any of some metrics, and the metrics' sums."""
    sums = {}
    for line in lines:
        values = [line[key] for key in keys if key in line]
        if values:
            # A resumed run may have written an iteration twice; the later line counts.
            sums[line["iteration"]] = sum(values)
    iterations = sorted(sums)
    return iterations, [sums[iteration] for iteration in iterations]


def _plot(axes: Axes, title: str, series: dict[str, _Series], colours: Colormap) -> None:
    for i, (label, (iterations, values)) in enumerate(series.items()):
        # A name that begins with _ would not be shown, and $ would begin a formula.
        shown = " " * label.startswith("_") + label.replace("$", r"\$")
        # Where the colours are used up they begin again, dashed.
        style = {"color": colours(i % colours.N), "linestyle": _STYLES[i // colours.N % 4]}
        axes.plot(iterations, values, label=shown, linewidth=1.6, **style)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("iteration")
    axes.grid(color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))

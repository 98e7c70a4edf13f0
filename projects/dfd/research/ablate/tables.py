"""An ablation's results for people: the Markdown table, the plot, and the HTML page."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...engine.writers import METRICS, read_metrics
from ..curves import loss_curves
from ..output import NO_VALUE, number, png
from ..page import Picture, Section, markdown_table, to_html
from .estimates import (
    DONE,
    FAILED,
    UNSETTLED,
    CellResult,
    Details,
    Estimate,
    Outcome,
    run_table,
    shown_metrics,
    verdicts,
)

_OVER_IMAGES = "over images"
_DARK, _LIGHT = "#1f4e79", "#9db4c9"


def result_table(
    results: Sequence[CellResult],
    *,
    metric: str,
    over_images: Mapping[str, tuple[float, float]] | None = None,
) -> list[list[str]]:
    """A row a cell; the first row is the header.

    Args:
        over_images: of each cell, its difference's interval over the test images, if it has one.
    """
    first, *others = shown_metrics(metric)
    said = verdicts(results)
    rows = [
        ["cell", "n", f"{first} mean ± sd", *others, "difference to baseline ± 95 %"]
        + [_OVER_IMAGES, "wins", "verdict"]
    ]
    for result in results:
        name, pairs = result.cell.name, result.differences
        difference = "baseline" if pairs is None else _difference(result.difference)
        rows.append(
            [name, str(len(result.values)), _spread(result.scores[first])]
            + [number(result.scores[key].mean, ".2f") for key in others]
            + [difference, _interval((over_images or {}).get(name))]
            + [f"{result.wins} of {len(pairs)}" if pairs else NO_VALUE]
            + [_verdict(result, said.get(name))]
        )
    if not over_images:
        place = rows[0].index(_OVER_IMAGES)
        rows = [[*row[:place], *row[place + 1 :]] for row in rows]
    return rows


def detail_table(found: Mapping[str, Details]) -> list[list[str]]:
    """A row a cell; the first row is the header."""
    sizes = next(iter(found.values())).sizes
    rows = [["cell", *sizes, "teacher's lead recovered", "time", "memory"]]
    for name, cell in found.items():
        numbers = [number(value, ".2f") for value in cell.sizes.values()]
        rows.append(
            [name, *numbers, number(cell.recovered, ".0%")]
            + [number(cell.seconds, ".2f"), number(cell.memory, ".2f")]
        )
    return rows


def _interval(ends: tuple[float, float] | None) -> str:
    return NO_VALUE if ends is None else "{:+.2f} to {:+.2f}".format(*ends)


def _verdict(result: CellResult, verdict: str | None) -> str:
    if verdict == UNSETTLED and result.difference.visible is not None:
        return f"{verdict} (visible from {number(result.difference.visible, '.2f')})"
    return verdict or NO_VALUE


def _spread(estimate: Estimate) -> str:
    if estimate.mean is None:
        return NO_VALUE
    return f"{number(estimate.mean, '.2f')} ± {number(estimate.sd, '.2f')}"


def _difference(estimate: Estimate) -> str:
    if estimate.mean is None:
        return NO_VALUE
    return f"{number(estimate.mean, '+.2f')} ± {number(estimate.half_width, '.2f')}"


def explanation(*, baseline: str, metric: str, draws: int = 0) -> str:
    """What the numbers of the table are; ``draws`` of the images, 0 if there are none."""
    said = (
        f"{metric} of boxes in percent on the test data, after training: mean and standard "
        f"deviation over n runs, one a seed. The baseline is {baseline}. Difference: of runs of "
        "the same seed, the mean over the seeds that both cells have and half the width of its "
        "95 % interval (Student's t), not corrected for the number of comparisons; wins: in how "
        "many of these pairs the cell was better. Verdict: whether the difference is settled, with "
        "an error of 5 % for all cells together (Holm); if not, the difference from which "
        "on so many seeds would show it four times in five, with one comparison."
    )
    if draws:
        said += (
            f" Over images: the 95 % interval of the mean difference of these same runs over other "
            f"test images (paired bootstrap, {draws} draws)."
        )
    return said


DETAILS_NOTE = (
    "AP by size; the share of the teacher's lead over the baseline that the cell has made up, "
    "where a run has measured its teacher (train.eval_teacher_first); seconds per iteration and "
    "peak memory as ratios to the baseline's, of the same seeds. Time means something only if "
    "nothing else used the machine."
)


def to_markdown(*parts: Sequence[Sequence[str]] | str) -> str:
    """Tables and paragraphs, in this order."""
    texts = [part if isinstance(part, str) else markdown_table(part) for part in parts]
    return "\n\n".join(texts) + "\n"


def draw_results(results: Sequence[CellResult], *, metric: str) -> bytes:
    """A PNG: each cell's runs and their mean, and beside them the paired differences."""
    # A $ would begin a formula.
    metric = metric.replace("$", r"\$")
    names = [result.cell.name.replace("$", r"\$") for result in results]
    names = ["\n".join(textwrap.wrap(name, 44)) for name in names]
    row = 0.2 + 0.17 * max(name.count("\n") + 1 for name in names)
    size = (11, 1.3 + row * len(results))
    drawing = Figure(figsize=size, dpi=120, layout="constrained")
    left, right = drawing.subplots(1, 2, sharey=True)
    for y, result in enumerate(results):
        _points(left, y, list(result.values.values()))
        _points(right, y, list((result.differences or {}).values()))
        if result.difference.half_width is not None:
            x, error = result.difference.mean, result.difference.half_width
            right.errorbar(x, y, xerr=error, color=_DARK, capsize=4, linewidth=1.6)
    left.set_yticks(range(len(results)), names)
    left.set_ylim(len(results) - 0.5, -0.5)
    left.set_title(f"{metric}: each run and the mean", fontsize=10, loc="left")
    right.axvline(0, color="#888", linewidth=1)
    right.set_title("Difference to the baseline, 95 % interval", fontsize=10, loc="left")
    for axes in (left, right):
        axes.grid(axis="x", color="#e5e5e5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return png(drawing)


def _points(axes: Axes, y: int, values: Sequence[float]) -> None:
    """Runs as light points, their mean as a dark one."""
    axes.scatter(values, [y] * len(values), s=26, color=_LIGHT, zorder=2)
    if values:
        axes.scatter([sum(values) / len(values)], [y], s=42, color=_DARK, marker="D", zorder=3)


def render_page(
    *,
    title: str,
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    plot: bytes,
    more: Sequence[Sequence[str]],
    outcomes: Sequence[Outcome],
    overrides: Sequence[tuple[str, Sequence[str]]],
) -> str:
    """The HTML page; it needs no other file.

    Args:
        rows, notes: the table, and paragraphs below it.
        more: the table of details.
        overrides: what all cells change, and each of them, by name.
    """
    changes = [["cell", "overrides"], *([name, " ".join(own)] for name, own in overrides)]
    curves = _curves(outcomes)
    said = "Each point is the median over the last 20 iterations." if curves else "None yet."
    sections = [
        Section(
            "Results",
            tables={"": rows},
            note=" ".join(notes),
            pictures=[Picture(plot, "results")],
        ),
        Section("Sizes and costs", tables={"": more}, note=DETAILS_NOTE),
        Section("What each cell changes", tables={"": changes}),
        Section("Runs", tables={"": run_table(outcomes)}),
        Section("Curves", text=[said], pictures=curves),
    ]
    return to_html(title, [], sections)


def _curves(outcomes: Sequence[Outcome]) -> list[Picture]:
    """A picture a cell, with the losses of its runs."""
    cells: dict[str, dict[str, list[dict[str, float]]]] = {}
    for outcome in outcomes:
        path = outcome.run.folder / METRICS
        metrics = read_metrics(str(path)) if path.exists() else []
        if outcome.status in (DONE, FAILED) and metrics:
            name = f"seed {outcome.run.seed}" + " (failed)" * (outcome.status == FAILED)
            cells.setdefault(outcome.run.cell.name, {})[name] = metrics
    return [
        Picture(loss_curves(runs, sum_levels=True, dpi=80), f"losses of {name}", name=name)
        for name, runs in cells.items()
    ]

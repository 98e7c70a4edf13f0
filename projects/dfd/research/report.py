"""The HTML page: a section of results, losses, detections, disparity, and what was run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from detectron2.config import instantiate

from ..data import class_names
from ..engine.hooks.disparity_image import MAX_DISPARITY
from ..errors import UserError
from .compare import CAVEAT, NO_VALUE, gains, tables
from .curves import loss_curves
from .detections import SCORE_THRESHOLD, compare_detections, draw_boxes
from .page import document, figure, img, table
from .run_folder import RunFolder

_DISPARITY_UNITS = {
    "level": "1 is the teacher's own variance on that level, which is what a student that knows "
    "no more than the teacher's mean is apart by",
    "channel": "in units of the variance of each channel; 2 is what unrelated features are apart "
    "by",
    "none": "in the unscaled units of the features",
}


def write_report(*, runs: Sequence[RunFolder], out: str, title: str, num_images: int) -> None:
    """Write the HTML page; an older one of that name is replaced.

    Raises:
        UserError: see ``compare_detections``; or the page cannot be written.
    """
    page = render_page(runs=runs, title=title, num_images=num_images)
    try:
        os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
        with open(out, "w", encoding="utf-8") as f:
            f.write(page)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error


def render_page(*, runs: Sequence[RunFolder], title: str, num_images: int) -> str:
    """The HTML page; see ``write_report``."""
    sections = [_results(runs), _losses(runs)]
    if num_images:
        sections.append(_detections(runs, num_images))
    sections += [_disparity(run) for run in runs if run.distilled]
    sections.append(_facts(runs))
    return document(title, "\n".join(sections))


def _results(runs: Sequence[RunFolder]) -> str:
    parts = [f"<p class='gain'>{escape(text)}</p>" for text in gains(runs)]
    parts += [f"<p class='caveat'>{escape(CAVEAT)}</p>", *map(table, tables(runs))]
    note = (
        "AP in percent, on all test images. Train images: with labels. Memory: peak of the "
        "training process, CUDA's allocator on a GPU, else resident. "
        f"{NO_VALUE}: no value."
    )
    return f"<h2>Results</h2>{''.join(parts)}<p class='note'>{note}</p>"


def _losses(runs: Sequence[RunFolder]) -> str:
    css = "wide" if any(run.distilled for run in runs) else ""
    curves = img(loss_curves(runs), "png", "loss curves", css)
    return f"<h2>Losses</h2><p>Each point is the median over the last 20 iterations.</p>{curves}"


def _detections(runs: Sequence[RunFolder], num_images: int) -> str:
    classes = class_names(runs[0].test_dataset())
    rows = []
    for file_name, columns in compare_detections(runs, num_images):
        tiles = []
        for name, boxes in columns.items():
            image = img(draw_boxes(file_name, boxes, classes), "jpeg", name)
            count = len(boxes.classes)
            caption = f"<b>{escape(name)}</b> {count} {'box' if count == 1 else 'boxes'}"
            tiles.append(figure(image, caption))
        file = escape(os.path.basename(file_name))
        rows.append(f"<h3>{file}</h3><div class='tiles'>{''.join(tiles)}</div>")
    text = (
        f"Evenly spaced test images; detections with a score of {SCORE_THRESHOLD} or more. A "
        "colour is a class."
    )
    return f"<h2>Detections</h2><p>{text}</p>" + "".join(rows)


def _disparity(run: RunFolder) -> str:
    """The first and the last disparity picture of a run."""
    heading = f"<h2>Disparity: {escape(run.name)}</h2>"
    paths = sorted(Path(run.folder, "disparity").glob("[0-9]*.png"))
    if not paths:
        return heading + "<p>The run drew none (train.disparity_images).</p>"
    # As the head measures it: at the criterion's scale, "level" if it has none.
    scale = getattr(instantiate(run.cfg.model.head.criterion), "scale", "level")
    unit = _DISPARITY_UNITS[scale]
    text = (
        "A row is a test image: the image, then each level of the pyramid over it. The colour "
        "says how far the student's features are from the teacher's at that place, the number is "
        f"the mean. 0: they agree; {escape(unit)}. The scale is the same in every picture, so "
        "training should darken it; what stays bright is what the student could not learn. Before "
        "training, batch norm has no statistics of the data yet: the first picture may be bright "
        "throughout."
    )
    bar = f"<p class='bar'>0 <span></span> {MAX_DISPARITY:g} or more</p>"
    figures = []
    for path in paths[:1] + paths[1:][-1:]:
        iteration = int(path.stem)
        image = img(path.read_bytes(), "png", f"disparity at iteration {iteration}", "wide")
        caption = f"after {iteration} iterations" if iteration else "before training"
        figures.append(figure(image, caption))
    return f"{heading}<p>{text}</p>{bar}{''.join(figures)}"


def _facts(runs: Sequence[RunFolder]) -> str:
    keys = ("seed", "iterations", "device", "processor", "threads", "torch", "detectron2")
    items = []
    for run in runs:
        summary = run.summary
        facts = [f"{key} {summary[key]}" for key in keys if summary.get(key) not in (None, "")]
        teacher = summary.get("teacher")
        if teacher:
            ap = f", AP {teacher['AP']:.2f}" if "AP" in teacher else ""
            facts.append(f"teacher {teacher['path']}, sha256 {teacher['sha256'][:12]}{ap}")
        items.append(f"<li><b>{escape(run.name)}</b>: {escape('; '.join(facts))}</li>")
    data = escape(runs[0].test_dataset())
    return f"<h2>What was run</h2><p>Test data: {data}</p><ul>{''.join(items)}</ul>"

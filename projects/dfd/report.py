"""Finished runs side by side: a table for the terminal and one self-contained HTML page.

A run is a folder that ``train_net.py`` wrote: ``config.yaml``, ``model_final.pth``,
``metrics.json``, ``summary.json`` and, of a distilled one, ``disparity/``.
"""

from __future__ import annotations

import base64
import glob
import io
import json
import math
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from .data import class_names, dataset_dicts
from .disparity_image import MAX_DISPARITY
from .engine.config import dataset_name
from .errors import UserError
from .weights import load_strict, read_weights

SCORE_THRESHOLD = 0.5
CAVEAT = (
    "One run each: differences of a point or two of AP are within what the seed changes. "
    "Repeat with several train.seed before concluding anything from a small difference."
)
_NO_VALUE = "–"
_FILES = ("summary.json", "config.yaml", "model_final.pth", "metrics.json")
# Of the drawn pictures, in pixels: small images are enlarged until a label can be read.
_SMALL, _LARGE = 360, 800
# Distinct on light and dark images; repeated for more classes.
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324")
_DISPARITY_UNITS = {
    "level": "1 is the teacher's own variance on that level, which is what a student that knows "
    "no more than the teacher's mean is apart by",
    "channel": "in units of the variance of each channel; 2 is what unrelated features are apart "
    "by",
    "none": "in the unscaled units of the features",
}


@dataclass(frozen=True)
class Run:
    """A finished run: ``metrics`` has one dict an iteration, in order."""

    name: str
    folder: str
    cfg: DictConfig
    summary: dict[str, Any]
    metrics: list[dict[str, float]]

    @property
    def scores(self) -> dict[str, float]:
        return self.summary["results"]["bbox"]

    @property
    def distilled(self) -> bool:
        return "student" in self.cfg.model

    @property
    def student(self) -> DictConfig:
        """The config of the evaluated model."""
        return self.cfg.model.student if self.distilled else self.cfg.model


def parse_runs(arguments: Sequence[str]) -> dict[str, str]:
    """``NAME=FOLDER`` arguments as a dict, in their order.

    Raises:
        UserError: an argument of another form, or a name given twice.
    """
    runs: dict[str, str] = {}
    for argument in arguments:
        name, _, folder = argument.partition("=")
        if not name or not folder:
            raise UserError(f"--run {argument}: it must be NAME=FOLDER")
        if name in runs:
            raise UserError(f"--run {argument}: the name {name} was given before: choose another")
        runs[name] = folder
    return runs


def load_runs(folders: Mapping[str, str]) -> list[Run]:
    """Read finished runs, by name.

    Raises:
        UserError: a folder or file is missing or cannot be read, a run has not finished, or the
            runs were tested on different data.
    """
    if not folders:
        raise UserError("no runs: give at least one with --run NAME=FOLDER")
    runs = [_load_run(name, folder) for name, folder in folders.items()]
    first = runs[0]
    for run in runs[1:]:
        ours, theirs = _test_data(run), _test_data(first)
        differing = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        if differing:
            key = differing[0]
            raise UserError(
                f"--run {run.name} was tested on other data than {first.name} "
                f"(dataloader.test.dataset: {key} is {ours.get(key)}, not {theirs.get(key)}): "
                "their numbers do not compare"
            )
    return runs


def _load_run(name: str, folder: str) -> Run:
    where = f"--run {name}"
    if not os.path.isdir(folder):
        raise UserError(f"{where}: no such folder: {folder}")
    for file in _FILES:
        if not os.path.isfile(os.path.join(folder, file)):
            reason = "the run has not finished" if file == "summary.json" else "it must be there"
            raise UserError(f"{where}: {folder} has no {file}: {reason}")
    try:
        with open(os.path.join(folder, "summary.json"), encoding="utf-8") as f:
            summary = json.load(f)
        with open(os.path.join(folder, "metrics.json"), encoding="utf-8") as f:
            lines = [json.loads(line) for line in f if line.strip()]
        cfg = LazyConfig.load(os.path.join(folder, "config.yaml"))
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{where}: {folder} cannot be read: {reason}") from error
    if "bbox" not in (summary.get("results") or {}):
        raise UserError(f"{where}: {folder}/summary.json holds no box AP: evaluate the run")
    # A resumed run may have written an iteration twice; the later line counts.
    by_iteration: dict[int, dict[str, float]] = {}
    for line in lines:
        by_iteration.setdefault(line["iteration"], {}).update(line)
    return Run(name, folder, cfg, summary, [by_iteration[i] for i in sorted(by_iteration)])


def _test_data(run: Run) -> dict[str, Any]:
    """What identifies a run's test data; paths are made absolute."""
    node = run.cfg.dataloader.test.dataset
    if isinstance(node, str):
        return {"name": node}
    values = OmegaConf.to_container(node, resolve=True)
    return {
        key: os.path.abspath(value) if isinstance(value, str) and os.path.exists(value) else value
        for key, value in values.items()
    }


# Tables: the first row is the header.


def summary_table(runs: Sequence[Run]) -> list[list[str]]:
    """AP and cost, a row a run."""
    header = "run|AP|AP50|AP75|train images|params (M)|iterations|s/iteration|memory (MiB)"
    return [header.split("|")] + [
        [
            run.name,
            *(_number(run.scores.get(key), 1) for key in ("AP", "AP50", "AP75")),
            _number(run.summary.get("train_images"), 0),
            _number(run.summary.get("parameters"), 2, 1e-6),
            _number(run.summary.get("iterations"), 0),
            _number(run.summary.get("seconds_per_iteration"), 3),
            _number(run.summary.get("peak_memory_mib"), 0),
        ]
        for run in runs
    ]


def class_table(runs: Sequence[Run]) -> list[list[str]]:
    """AP of each class, a column a run; only the header if no run has any."""
    classes = dict.fromkeys(
        key.removeprefix("AP-") for run in runs for key in run.scores if key.startswith("AP-")
    )
    return [["AP of class", *(run.name for run in runs)]] + [
        [name, *(_number(run.scores.get(f"AP-{name}"), 1) for run in runs)] for name in classes
    ]


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Plain text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def format_text(runs: Sequence[Run]) -> str:
    """Everything that the terminal shows about runs."""
    parts = [format_table(summary_table(runs))]
    classes = class_table(runs)
    if len(classes) > 1:
        parts.append(format_table(classes))
    parts += [textwrap.fill(text, 96) for text in (*gains(runs), CAVEAT)]
    return "\n\n".join(parts)


def gains(runs: Sequence[Run]) -> list[str]:
    """A sentence for every distilled run beside a plain one that is the same without a teacher."""
    sentences = []
    for distilled in (run for run in runs if run.distilled):
        inherited = ", ".join(distilled.cfg.model.get("inherit") or ())
        start = f" and {inherited} initialised from the teacher's weights" if inherited else ""
        for plain in (run for run in runs if not run.distilled):
            before, after = (run.scores.get("AP", math.nan) for run in (plain, distilled))
            if _recipe(plain) == _recipe(distilled):
                sentences.append(
                    f'"{distilled.name}" is "{plain.name}" with a teacher beside it in training'
                    f"{start}, all else equal: AP {_number(before, 1)} without, "
                    f"{_number(after, 1)} with ({_number(after - before, 1, sign=True)})."
                )
    return sentences


def _recipe(run: Run) -> list[Any]:
    """What a plain run and its distilled counterpart have in common."""
    cfg = run.cfg
    nodes = (run.student, cfg.dataloader.train, cfg.optimizer, cfg.lr_multiplier)
    settings = [cfg.train.get(k) for k in ("max_iter", "seed", "init_checkpoint", "amp")]
    return [OmegaConf.to_container(node) for node in nodes] + settings


def _number(value: float | None, digits: int, factor: float = 1.0, sign: bool = False) -> str:
    if value is None or math.isnan(value):
        return _NO_VALUE
    return f"{value * factor:{'+' if sign else ''}.{digits}f}"


# Pictures.


def loss_curves(runs: Sequence[Run]) -> bytes | None:
    """A PNG of the task losses and, beside it, of the distillation losses; None without any."""
    task = {run.name: _series(run, _task_loss) for run in runs}
    levels = {
        f"{run.name}: {key.removeprefix('loss_dfd_')}": _series(run, lambda m, k=key: m.get(k))
        for run in runs
        for key in sorted({k for m in run.metrics for k in m if k.startswith("loss_dfd_")})
    }
    if not any(iterations for iterations, _ in task.values()):
        return None
    panels = [("Task loss (every loss_* but loss_dfd_*)", task, matplotlib.colormaps["tab10"])]
    if levels:
        # Other colours than the runs', so that neither is taken for the other.
        shades = matplotlib.colormaps["plasma"].resampled(len(levels) + 1)
        panels.append(("Distillation loss of each level, weighted; log scale", levels, shades))
    figure = Figure(figsize=(6 * len(panels), 3.6), dpi=150, layout="constrained")
    subplots = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, series, colours) in zip(subplots, panels, strict=True):
        for i, (label, (iterations, values)) in enumerate(series.items()):
            axes.plot(iterations, values, label=label, linewidth=1.6, color=colours(i))
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("iteration")
        if series is task:
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log", nonpositive="mask")
        axes.grid(color="#e5e5e5")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _task_loss(metrics: Mapping[str, float]) -> float | None:
    own = [
        value
        for key, value in metrics.items()
        if key.startswith("loss_") and not key.startswith("loss_dfd_")
    ]
    return sum(own) if own else None


def _series(
    run: Run, value_of: Callable[[Mapping[str, float]], float | None]
) -> tuple[list[int], list[float]]:
    points = [(m["iteration"], value_of(m)) for m in run.metrics]
    kept = [(iteration, value) for iteration, value in points if value is not None]
    return [i for i, _ in kept], [v for _, v in kept]


@dataclass(frozen=True)
class Boxes:
    """Boxes on one image: (M,4) XYXY pixels of the original image, class ids, scores or None."""

    boxes: np.ndarray
    classes: list[int]
    scores: list[float] | None = None


@dataclass(frozen=True)
class Comparison:
    """One test image: the ground truth, and the detections of each run by its name."""

    file_name: str
    truth: Boxes
    detections: dict[str, Boxes]


def compare_detections(runs: Sequence[Run], num_images: int) -> list[Comparison]:
    """What every run finds on the same, evenly spaced test images.

    Raises:
        UserError: the test data cannot be read, or a checkpoint does not fit its config.
    """
    if num_images < 0:
        raise UserError(f"--num-images {num_images}: it must be 0 or more")
    records = dataset_dicts(dataset=_dataset(runs[0]), filter_empty=False)
    count = min(num_images, len(records))
    indices = [int((i + 0.5) * len(records) / count) for i in range(count)]
    found = {run.name: _detect(run, indices) for run in runs} if count else {}
    return [
        Comparison(
            records[index]["file_name"],
            _ground_truth(records[index]),
            {name: detections[i] for name, detections in found.items()},
        )
        for i, index in enumerate(indices)
    ]


def _dataset(run: Run) -> str:
    return dataset_name(run.cfg.dataloader.test.dataset)


def _ground_truth(record: Mapping[str, Any]) -> Boxes:
    objects = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
    boxes = [BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    return Boxes(np.array(boxes).reshape(-1, 4), [a["category_id"] for a in objects])


@torch.no_grad()
def _detect(run: Run, indices: Sequence[int]) -> list[Boxes]:
    model = _build_student(run)
    # Straight from the data set: the loader itself would read every image before these.
    dataset = instantiate(run.cfg.dataloader.test).dataset
    found = []
    for index in indices:
        instances = model([dataset[index]])[0]["instances"].to("cpu")
        instances = instances[instances.scores >= SCORE_THRESHOLD]
        found.append(
            Boxes(
                instances.pred_boxes.tensor.numpy(),
                instances.pred_classes.tolist(),
                instances.scores.tolist(),
            )
        )
    return found


def _build_student(run: Run) -> nn.Module:
    device = run.cfg.train.get("device", "cpu")
    if device == "auto" or not torch.cuda.is_available():
        device = "cuda" if torch.cuda.is_available() else "cpu"
    student = instantiate(run.student).to(device).eval()
    weights = read_weights(os.path.join(run.folder, "model_final.pth"), f"--run {run.name}")
    load_strict(student, weights, f"--run {run.name}")
    return student


def draw_boxes(file_name: str, boxes: Boxes, classes: Sequence[str]) -> Image.Image:
    """An image with boxes, class names and scores, enlarged or reduced to a legible size."""
    image = Image.fromarray(np.ascontiguousarray(read_image(file_name, "RGB")))
    scale = _scale(max(image.size))
    size = tuple(round(side * scale) for side in image.size)
    image = image.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    font = ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"))
    font = font.font_variant(size=16 if max(size) <= 480 else 15)
    # Small boxes last, so that a large one does not hide their labels.
    order = np.argsort(-np.prod(boxes.boxes[:, 2:] - boxes.boxes[:, :2], axis=1))
    for i in order.tolist():
        colour = _COLOURS[boxes.classes[i] % len(_COLOURS)]
        box = [float(v) * scale for v in boxes.boxes[i]]
        draw.rectangle(box, outline=colour, width=2)
        label = classes[boxes.classes[i]]
        if boxes.scores is not None:
            label += f" {boxes.scores[i]:.2f}"
        _draw_label(draw, label, box, colour, font, size)
    return image


def _scale(longest: int) -> float:
    if longest > _LARGE:
        return _LARGE / longest
    return math.ceil(_SMALL / longest)


def _draw_label(
    draw: ImageDraw.ImageDraw,
    label: str,
    box: Sequence[float],
    colour: str,
    font: ImageFont.FreeTypeFont,
    size: tuple[int, ...],
) -> None:
    """A label on top of its box, or inside it where the image ends above."""
    width, height = draw.textlength(label, font=font) + 4, font.size + 4
    x = min(max(box[0], 0), max(size[0] - width, 0))
    y = box[1] - height if box[1] >= height else box[1]
    draw.rectangle([x, y, x + width, y + height], fill=colour)
    draw.text((x + 2, y + 1), label, fill="white", font=font)


def disparity_pictures(run: Run) -> list[tuple[int, bytes]]:
    """The first and the last disparity picture of a run, PNG, with their iterations."""
    pattern = os.path.join(glob.escape(run.folder), "disparity", "*.png")
    paths = sorted(p for p in glob.glob(pattern) if re.fullmatch(r"\d+\.png", os.path.basename(p)))
    pictures = []
    for path in paths[:1] + paths[1:][-1:]:
        with open(path, "rb") as f:
            pictures.append((int(os.path.basename(path)[:-4]), f.read()))
    return pictures


# The page.


def write_report(*, runs: Sequence[Run], out: str, title: str, num_images: int) -> None:
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


def render_page(*, runs: Sequence[Run], title: str, num_images: int) -> str:
    """The HTML page; see ``write_report``."""
    sections = [_results_section(runs)]
    curves = loss_curves(runs)
    if curves is not None:
        text = "Each point is the median over the last 20 iterations."
        figure = _img(
            curves, "png", "loss curves", "wide" if any(r.distilled for r in runs) else ""
        )
        sections.append(f"<h2>Losses</h2><p>{text}</p>{figure}")
    comparisons = compare_detections(runs, num_images)
    if comparisons:
        sections.append(_detection_section(runs, comparisons))
    sections += [_disparity_section(run) for run in runs if run.distilled]
    sections.append(_facts_section(runs))
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(sections))


def _results_section(runs: Sequence[Run]) -> str:
    parts = [f"<p class='gain'>{escape(text)}</p>" for text in gains(runs)]
    parts += [f"<p class='caveat'>{escape(CAVEAT)}</p>", _html_table(summary_table(runs))]
    classes = class_table(runs)
    if len(classes) > 1:
        parts.append(_html_table(classes))
    parts.append(
        "<p class='note'>AP in percent, on all test images. Train images: with labels. Memory: "
        "peak of the training process, CUDA's allocator on a GPU, else resident. "
        f"{_NO_VALUE}: no value.</p>"
    )
    return "<h2>Results</h2>" + "".join(parts)


def _detection_section(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> str:
    classes = class_names(_dataset(runs[0]))
    rows = []
    for comparison in comparisons:
        columns = {"ground truth": comparison.truth, **comparison.detections}
        tiles = []
        for name, boxes in columns.items():
            picture = io.BytesIO()
            draw_boxes(comparison.file_name, boxes, classes).save(picture, "JPEG", quality=90)
            image = _img(picture.getvalue(), "jpeg", name)
            count = len(boxes.classes)
            caption = f"<b>{escape(name)}</b> {count} {'box' if count == 1 else 'boxes'}"
            tiles.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
        file = escape(os.path.basename(comparison.file_name))
        style = f"grid-template-columns: repeat({len(columns)}, minmax(240px, 1fr))"
        rows.append(f"<h3>{file}</h3><div class='tiles' style='{style}'>{''.join(tiles)}</div>")
    text = (
        f"Evenly spaced test images; detections with a score of {SCORE_THRESHOLD} or more. A "
        "colour is a class."
    )
    return f"<h2>Detections</h2><p>{text}</p>" + "".join(rows)


def _disparity_section(run: Run) -> str:
    heading = f"<h2>Disparity: {escape(run.name)}</h2>"
    pictures = disparity_pictures(run)
    if not pictures:
        return heading + "<p>The run drew none (train.disparity_images).</p>"
    criterion = run.cfg.model.head.get("criterion") or {}
    unit = _DISPARITY_UNITS.get(criterion.get("scale", "level"), "")
    text = (
        "A row is a test image: the image, then each level of the pyramid over it. The colour "
        "says how far the student's features are from the teacher's at that place, the number is "
        f"the mean. 0: they agree; {escape(unit)}. The scale is the same in every picture, so "
        "training should darken it; what stays bright is what the student could not learn. Before "
        "training, batch norm has no statistics of the data yet: the first picture may be bright "
        "throughout."
    )
    bar = f"<p class='bar'>0 <span></span> {MAX_DISPARITY:g} or more</p>"
    figures = [
        f"<figure>{_img(data, 'png', f'disparity at iteration {iteration}', 'wide')}"
        f"<figcaption>{f'after {iteration} iterations' if iteration else 'before training'}"
        "</figcaption></figure>"
        for iteration, data in pictures
    ]
    return f"{heading}<p>{text}</p>{bar}{''.join(figures)}"


def _facts_section(runs: Sequence[Run]) -> str:
    items = []
    for run in runs:
        summary = run.summary
        keys = ("seed", "iterations", "device", "threads")
        facts = [f"{key} {summary.get(key, _NO_VALUE)}" for key in keys]
        teacher = summary.get("teacher")
        if teacher:
            facts.append(f"teacher {teacher['path']}, sha256 {teacher['sha256'][:12]}")
        items.append(f"<li><b>{escape(run.name)}</b>: {escape('; '.join(facts))}</li>")
    data = escape(_dataset(runs[0]))
    return f"<h2>What was run</h2><p>Test data: {data}</p><ul>{''.join(items)}</ul>"


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='scroll'>{table}</div>"


def _img(data: bytes, kind: str, alt: str, css: str = "") -> str:
    encoded = base64.b64encode(data).decode("ascii")
    return f"<img class='{css}' alt='{escape(alt)}' src='data:image/{kind};base64,{encoded}'>"


_STYLE = """
:root { color-scheme: light; }
body { margin: 2.5rem auto; padding: 0 1.5rem; max-width: 1240px; background: #fff; color: #1f2328;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.75rem; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-bottom: .3rem;
  border-bottom: 1px solid #d8dee4; }
h3 { font-size: .9rem; font-weight: 600; color: #59636e; margin: 1.2rem 0 .3rem; }
p, ul { max-width: 76ch; }
.gain { font-size: 1.1rem; font-weight: 600; }
.caveat { background: #fff8e1; border-left: 4px solid #e0a800; padding: .5rem .9rem; }
.note, figcaption { font-size: .85rem; color: #59636e; }
.scroll, .tiles { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem; text-align: right; border-bottom: 1px solid #e5e9ed;
  white-space: nowrap; }
th { font-weight: 600; color: #59636e; border-bottom: 2px solid #c5ccd3; }
th:first-child, td:first-child { text-align: left; }
td:first-child { font-weight: 600; }
.tiles { display: grid; gap: .8rem; }
figure { margin: 0 0 .6rem; }
img { display: block; width: 100%; max-width: 800px; height: auto; }
img.wide { max-width: 1180px; }
.bar { display: flex; align-items: center; gap: .6rem; font-size: .9rem; }
.bar span { width: 16rem; height: .9rem; border: 1px solid #c5ccd3;
  background: linear-gradient(to right, #440154, #3b528b, #21918c, #5ec962, #fde725); }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""

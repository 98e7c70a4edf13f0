"""The HTML page: a section of results, losses, detections, disparity, and what was run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import instantiate
from detectron2.data.detection_utils import read_image
from omegaconf import DictConfig

from ..data import class_names, registered_name
from ..deploy.draw import draw_boxes
from ..distill.disparity import scale_and_measure
from ..engine.hooks.disparity_image import MAX_DISPARITY
from ..engine.run_folder import RunFolder
from ..errors import UserError
from .compare import CAVEAT, gains, tables
from .curves import loss_curves
from .detections import SCORE_THRESHOLD, compare_detections
from .output import NO_VALUE
from .page import Picture, Section, to_html

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
    return to_html(title, [], sections)


def _results(runs: Sequence[RunFolder]) -> Section:
    summary, *others = tables(runs)
    return Section(
        "Results",
        leads=gains(runs),
        caveat=CAVEAT,
        tables={"": summary} | dict(zip(("AP of each class",), others, strict=False)),
        note="AP in percent, on all test images. Train images: with labels. Memory: peak of the "
        f"training process, CUDA's allocator on a GPU, else resident. {NO_VALUE}: no value.",
    )


def _losses(runs: Sequence[RunFolder]) -> Section:
    return Section(
        "Losses",
        text=["Each point is the median over the last 20 iterations."],
        pictures=[Picture(loss_curves({run.name: run.metrics for run in runs}), "loss curves")],
    )


def _detections(runs: Sequence[RunFolder], num_images: int) -> Section:
    classes = class_names(runs[0].test_dataset())
    rows = {}
    compared = compare_detections(runs, num_images)
    names = _short_names([file_name for file_name, _ in compared])
    for name, (file_name, columns) in zip(names, compared, strict=True):
        tiles = []
        for column, boxes in columns.items():
            count = len(boxes.classes)
            caption = f"{count} {'box' if count == 1 else 'boxes'}"
            image = draw_boxes(read_image(file_name, "RGB"), boxes, classes)
            tiles.append(Picture(image, column, caption, column))
        rows[name] = tiles
    text = f"Evenly spaced test images; detections with a score of {SCORE_THRESHOLD} or more."
    return Section("Detections", text=[f"{text} A colour is a class."], tiles=rows)


def _short_names(paths: Sequence[str]) -> list[str]:
    """Of each path as many of its last parts as it takes to tell them apart."""
    parts = [path.split("/") for path in paths]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {path}" for number, path in enumerate(paths, 1)]


def _disparity(run: RunFolder) -> Section:
    """The first and the last disparity picture of a run."""
    title = f"Disparity: {run.name}"
    paths = sorted(Path(run.folder, "disparity").glob("[0-9]*.png"))
    if not paths:
        return Section(title, text=["The run drew none (train.disparity_images)."])
    # As the head measures it: at the criterion's scale, "level" if it has none.
    scale, _ = scale_and_measure(instantiate(run.cfg.model.head.criterion))
    text = (
        "A row is a test image: the image, then each level of the pyramid over it. The colour "
        "says how far the student's features are from the teacher's at that place, the number is "
        f"the mean. 0: they agree; {_DISPARITY_UNITS[scale]}. The scale is the same in every "
        "picture, so training should darken it; what stays bright is what the student could not "
        "learn. Before training, batch norm has no statistics of the data yet: the first picture "
        "may be bright throughout."
    )
    pictures = []
    for path in paths[:1] + paths[1:][-1:]:
        iteration = int(path.stem)
        caption = f"after {iteration} iterations" if iteration else "before training"
        alt = f"disparity at iteration {iteration}"
        pictures.append(Picture(path.read_bytes(), alt, caption))
    return Section(title, text=[text], colours=f"{MAX_DISPARITY:g} or more", pictures=pictures)


def _facts(runs: Sequence[RunFolder]) -> Section:
    keys = "seed iterations device processor threads processes torch detectron2".split()
    items = {}
    for run in runs:
        summary = run.summary
        facts = [f"{key} {summary[key]}" for key in keys if summary.get(key) not in (None, "")]
        code = summary.get("code")
        if code:
            facts.append(f"code {code['commit'] or code['sha256'][:12]}")
        teacher = summary.get("teacher")
        if teacher:
            ap = f", AP {teacher['AP']:.2f}" if "AP" in teacher else ""
            facts.append(f"teacher {teacher['path']}, sha256 {teacher['sha256'][:12]}{ap}")
        for file in (summary.get("start"), *summary.get("pretrained", ())):
            if file:
                sha256 = f", sha256 {file['sha256'][:12]}" if file["sha256"] else ""
                facts.append(f"begins with {file['path']}{sha256}")
        items[run.name] = "; ".join(facts)
    data = _named(runs[0].cfg.dataloader.test.dataset)
    return Section("What was run", text=[f"Test data: {data}"], items=items)


def _named(node: DictConfig | str) -> str:
    """What the config calls a dataset. Its files are not read: they may be on another machine."""
    if isinstance(node, str):
        return node
    if node.get("names") is not None:
        return registered_name(node)
    told = [str(node[key]) for key in ("json", "root", "split") if node.get(key) is not None]
    return " ".join(told) or str(node.get("_target_"))

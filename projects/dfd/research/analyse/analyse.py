"""The whole analysis: from a run's folder to the folder of its analysis."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from ...data import class_names
from ...distill.detector import DistilledDetector
from ...distill.disparity import scale_and_measure
from ...errors import UserError
from ..page import Section
from . import plots
from .collect import Example, Tally, collect
from .load import (
    TestImages,
    build_detector,
    find_checkpoints,
    load_run,
    load_snapshots,
    trained_iterations,
)
from .numbers import summarise
from .report import check_out, render, sections, write_folder


def analyse(
    *,
    run: str,
    out: str,
    overrides: Sequence[str] = (),
    num_images: int | None = None,
    num_pictures: int = 4,
    max_checkpoints: int = 10,
    score: float = 0.5,
    iou: float = 0.5,
    trust_code: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Section]:
    """Analyse a finished distilled run on its test data and write the folder ``out``.

    Args:
        run: the run's folder.
        overrides: ``key=value`` of its config.
        num_images: so many evenly spaced test images; None: all.
        num_pictures: of images with their disparity.
        max_checkpoints: if the run kept more, so many evenly spaced ones, the last included. A
            student of each is held in memory.
        score, iou: a detection counts from this score on, and finds a label from this overlap on.
        trust_code: whether the run's config may name functions of any module.
        progress: called with the number of images done and of all.

    Returns:
        The sections of the page: tables of text by caption.

    Raises:
        UserError: bad input; nothing was written.
    """
    _check_settings(num_pictures, score, iou)
    run, out = os.path.expanduser(run), os.path.expanduser(out)
    check_out(out)
    cfg = load_run(run, overrides, trusted=trust_code)
    length = trained_iterations(run, cfg)
    checkpoints = find_checkpoints(run, max_iter=length, limit=max_checkpoints)
    images = TestImages(cfg, num_images)
    model = build_detector(cfg, run)
    tallies, examples = collect(
        model=model,
        snapshots=load_snapshots(model, checkpoints, class_names(images.name)),
        images=images,
        score=score,
        iou=iou,
        num_examples=num_pictures,
        progress=progress,
    )
    strides = [pair.stride for pair in model.head.pairs]
    results = [summarise(tally, strides=strides) for tally in tallies]
    numbers = {"run": run, "score": score, "iou": iou}
    numbers |= _facts(model, images, results[-1]) | {"checkpoints": results}
    drawn, captions = _draw(results, tallies[-1], examples)
    title = f"Disparity of {os.path.basename(os.path.normpath(run))}"
    write_folder(out, render(title=title, numbers=numbers, plots=drawn, examples=captions))
    return sections(numbers, drawn, captions)


def _facts(model: DistilledDetector, images: TestImages, last: dict[str, Any]) -> dict[str, Any]:
    """What was measured, and on what."""
    teacher, counts = model.teacher.weights, last["errors"]["counts"]
    criterion = model.head.criteria[model.head.pairs[0].name]
    return {
        "data": images.name,
        "images": len(images),
        "images_in_data": images.total,
        "labels": counts["detected"]["all"] + counts["missed"]["all"],
        "scale": scale_and_measure(criterion)[0],
        "teacher": {"path": teacher.path, "sha256": teacher.sha256},
        "strides": {pair.name: pair.stride for pair in model.head.pairs},
    }


def _draw(
    results: Sequence[dict[str, Any]], last: Tally, examples: Sequence[Example]
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Every PNG by file name, and the captions of the pictures of images."""
    drawn = {
        "distribution.png": plots.draw_distribution(last),
        "sizes.png": plots.draw_sizes(results[-1]),
        "errors.png": plots.draw_errors(results[-1], last),
    }
    if len(results) > 1:
        drawn["training.png"] = plots.draw_training(results)
    captions = {}
    for i, example in enumerate(examples, start=1):
        drawn[f"image_{i}.png"] = plots.draw_example(example)
        captions[f"image_{i}.png"] = example.name
    return drawn, captions


def _check_settings(num_pictures: int, score: float, iou: float) -> None:
    if num_pictures < 0:
        raise UserError(f"--num-pictures {num_pictures}: it must be 0 or more")
    if not 0 <= score <= 1:
        raise UserError(f"--score {score:g}: it must be from 0 to 1")
    if not 0 < iou <= 1:
        raise UserError(f"--iou {iou:g}: it must be above 0 and at most 1")

"""The analysis for people, as Markdown and as one HTML page, and its folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import UserError
from ..page import Picture, Rows, Section, to_html, to_markdown
from . import tables
from .matching import SIZES

_FILES = re.compile(
    r"analysis\.json|analysis\.md|index\.html|(distribution|sizes|training|errors|image_\d+)\.png"
)


def sections(
    numbers: dict[str, Any], plots: Mapping[str, bytes], examples: Mapping[str, str]
) -> list[Section]:
    """The parts of the analysis.

    Args:
        numbers: the content of ``analysis.json``.
        plots: PNG by file name.
        examples: of the pictures of images, caption by file name.
    """

    def picture(name: str, title: str, caption: str) -> Picture:
        return Picture(plots[name], f"{title}: {caption}", caption, file=name)

    checkpoints = numbers["checkpoints"]
    last = checkpoints[-1]
    at_the_end = f"After {last['iteration']} iterations."
    parts = [
        Section(
            "Cells and levels",
            tables={"Disparity of cells": tables.level_table(last)},
            note="High: above the image's mean on that level; high / low is the mean of those "
            "cells over the mean of the others.",
            pictures=[picture("distribution.png", "Cells and levels", at_the_end)],
        ),
        Section(
            "Object sizes",
            tables={"Mean disparity": tables.size_table(last)},
            note=_size_note(last["errors"]["counts"]),
            pictures=[picture("sizes.png", "Object sizes", at_the_end)],
        ),
        Section("Training time", note="The run kept one checkpoint (train.checkpointer.period)."),
        Section(
            "Errors",
            tables=_error_tables(last),
            note=_error_note(numbers),
            pictures=[picture("errors.png", "Errors", at_the_end)],
        ),
        Section(
            "Pictures",
            text=[_PICTURES],
            pictures=[picture(name, "Pictures", text) for name, text in examples.items()],
        ),
    ]
    if len(checkpoints) > 1:
        image = picture("training.png", "Training time", "Each point is a checkpoint.")
        parts[2] = Section("Training time", tables=_time_tables(checkpoints), pictures=[image])
    return parts


_PICTURES = (
    "Evenly spaced test images, not chosen by what they show: the image with its labels and the "
    "false detections, and the disparity of the finest levels with the errors over it, at the "
    "first and the last checkpoint."
)


def _error_tables(last: dict[str, Any]) -> dict[str, Rows]:
    return {
        "Mean disparity inside boxes and in the background": tables.error_table(last),
        "Disparity inside a labelled box as a sign that it is missed": tables.auc_table(last),
        "Share of the area above its image's mean disparity": tables.high_table(last),
    }


def _time_tables(checkpoints: Sequence[dict[str, Any]]) -> dict[str, Rows]:
    captions = {
        "mean": "Mean disparity",
        "ratio": "High / low",
        "rank_correlation_with_last": "Rank correlation with the last map (Spearman), mean over "
        "images",
    }
    return {text: tables.time_table(checkpoints, key) for key, text in captions.items()}


def _size_note(counts: dict[str, Any]) -> str:
    objects = {size: counts["detected"][size] + counts["missed"][size] for size in SIZES}
    return (
        "Mean disparity of the cells whose centre lies in a labelled box, by the box's area at "
        "the network's input: small below 32 x 32 pixels, medium below 96 x 96. Where boxes "
        "overlap, the smallest owns the cell. Labelled objects: "
        f"{', '.join(f'{count} {size}' for size, count in objects.items())}."
    )


def _error_note(numbers: dict[str, Any]) -> str:
    counts = numbers["checkpoints"][-1]["errors"]["counts"]
    return (
        f"{counts['detected']['all']} labelled objects detected, {counts['missed']['all']} "
        f"missed, {counts['false']['all']} false detections: score {numbers['score']:g} or more, "
        f"overlap {numbers['iou']:g} or more, same class, the surest detection first. All levels: "
        "the mean over the cells of every level whose centre lies in the box, most of which are "
        "the finest level's. AUC: in how many of all pairs of a missed and a detected object the "
        "missed one has the higher mean disparity. Same class and size, same image: such pairs "
        "only, since these tell how hard an object is too. Errors: the area of missed objects and "
        "false detections; levels are joined by area. Intervals: bootstrap over images; they are "
        "not corrected for the number of rows. None of it shows what causes what."
    )


def introduction(numbers: dict[str, Any]) -> list[str]:
    """What was measured, on what and how."""
    points = ", ".join(str(point["iteration"]) for point in numbers["checkpoints"])
    return [
        f"Disparity of the run {numbers['run']} on {numbers['images']} of "
        f"{numbers['images_in_data']} images of {numbers['data']} with {numbers['labels']} "
        f"labelled boxes, after {points} iterations. Teacher: {numbers['teacher']['path']}, sha256 "
        f"{numbers['teacher']['sha256'][:12]}.",
        "The disparity of a cell is the mean over channels of (s - t)^2, with student and teacher "
        f'at the scale "{numbers["scale"]}" of the criterion. It is measured image by image, '
        "without padding, so that the scale is that of each image; the student runs as in "
        "evaluation, its batch norms with running statistics. The losses in training use the "
        "batch's, so their values differ a little.",
    ]


def check_out(out: str) -> None:
    """
    Raises:
        UserError: there is something that is no earlier analysis, or nothing can be written.
    """
    if os.path.exists(out):
        if not os.path.isdir(out):
            raise UserError(f"--out {out} is a file: name a folder")
        names = sorted(os.listdir(out))
        foreign = [name for name in names if not _FILES.fullmatch(name)]
        if foreign or (names and "analysis.json" not in names):
            raise UserError(
                f"--out {out} is no earlier analysis (it holds {(foreign or names)[0]}): choose "
                "another folder"
            )
    above = os.path.abspath(out)
    while not os.path.exists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above) or not os.access(above, os.W_OK):
        raise UserError(f"--out {out} cannot be written: {above} is no folder that may be")


def write_folder(out: str, files: Mapping[str, bytes]) -> None:
    """Write the files of an analysis; those of an earlier one go.

    Raises:
        UserError: see ``check_out``; or a file cannot be written.
    """
    check_out(out)
    try:
        os.makedirs(out, exist_ok=True)
        for name in os.listdir(out):
            os.remove(os.path.join(out, name))
        for name, content in files.items():
            with open(os.path.join(out, name), "wb") as f:
                f.write(content)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error


def render(
    *, title: str, numbers: dict[str, Any], plots: Mapping[str, bytes], examples: Mapping[str, str]
) -> dict[str, bytes]:
    """Every file of the folder by name."""
    intro, parts = introduction(numbers), sections(numbers, plots, examples)
    return {
        "analysis.json": json.dumps(numbers, indent=1, allow_nan=False).encode(),
        "analysis.md": to_markdown(title, intro, parts).encode(),
        "index.html": to_html(title, intro, parts).encode(),
        **plots,
    }

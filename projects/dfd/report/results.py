"""AP and cost of runs as tables, and sentences about what distillation gained."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from .runs import Run

CAVEAT = (
    "One run each: differences of a point or two of AP are within what the seed changes. "
    "Repeat with several train.seed before concluding anything from a small difference."
)
NO_VALUE = "–"


def format_text(runs: Sequence[Run]) -> str:
    """Everything that the terminal shows about runs."""
    parts = [_format_table(rows) for rows in tables(runs)]
    parts += [textwrap.fill(text, 96) for text in (*gains(runs), CAVEAT)]
    return "\n\n".join(parts)


def _format_table(rows: Sequence[Sequence[str]]) -> str:
    """Plain text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(line) for line in lines)


def tables(runs: Sequence[Run]) -> list[list[list[str]]]:
    """The tables that have rows; the first row of each is its header."""
    return [rows for rows in (_summary_table(runs), _class_table(runs)) if len(rows) > 1]


def _summary_table(runs: Sequence[Run]) -> list[list[str]]:
    """AP and cost, a row a run."""
    header = "run|AP|AP50|AP75|train images|params (M)|iterations|s/iteration|memory (MiB)"
    return [header.split("|")] + [
        [
            run.name,
            *(_number(run.scores.get(key)) for key in ("AP", "AP50", "AP75")),
            _number(run.summary.get("train_images"), ".0f"),
            _number(run.summary.get("parameters", math.nan) / 1e6, ".2f"),
            _number(run.summary.get("iterations"), ".0f"),
            _number(run.summary.get("seconds_per_iteration"), ".3f"),
            _number(run.summary.get("peak_memory_mib"), ".0f"),
        ]
        for run in runs
    ]


def _class_table(runs: Sequence[Run]) -> list[list[str]]:
    """AP of each class, a column a run."""
    keys = dict.fromkeys(key for run in runs for key in run.scores if key.startswith("AP-"))
    return [["AP of class", *(run.name for run in runs)]] + [
        [key.removeprefix("AP-"), *(_number(run.scores.get(key)) for run in runs)] for key in keys
    ]


def gains(runs: Sequence[Run]) -> list[str]:
    """A sentence for every distilled run beside a plain one that is the same without a teacher."""
    sentences = []
    for distilled, plain in itertools.product(runs, repeat=2):
        if plain.distilled or not distilled.distilled or _recipe(plain) != _recipe(distilled):
            continue
        inherited = ", ".join(distilled.cfg.model.get("inherit") or ())
        start = f" and {inherited} initialised from the teacher's weights" if inherited else ""
        before, after = (run.scores.get("AP", math.nan) for run in (plain, distilled))
        sentences.append(
            f'"{distilled.name}" is "{plain.name}" with a teacher beside it in training{start}, '
            f"all else equal: AP {_number(before)} without, {_number(after)} with "
            f"({_number(after - before, '+.1f')})."
        )
    return sentences


def _recipe(run: Run) -> list[Any]:
    """What a plain run and its distilled counterpart have in common."""
    cfg = run.cfg
    nodes = (run.student, cfg.dataloader.train, cfg.optimizer, cfg.lr_multiplier)
    settings = [cfg.train.get(k) for k in ("max_iter", "seed", "init_checkpoint", "amp")]
    return [OmegaConf.to_container(node) for node in nodes] + settings


def _number(value: float | None, spec: str = ".1f") -> str:
    return NO_VALUE if value is None or math.isnan(value) else format(value, spec)

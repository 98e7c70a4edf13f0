"""What is needed to make an ablation's numbers again, and to see what they were made of."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from ...weights.files import file_sha256
from ..output import without_nan
from .cells import Cell
from .estimates import Outcome

_FACTS = (
    *("results", "seconds_per_iteration", "peak_memory_mib"),
    *("processor", "threads", "processes", "torch"),
    *("code", "teacher", "start", "pretrained"),
)


def manifest(
    outcomes: Sequence[Outcome],
    cells: Sequence[Cell],
    *,
    config_file: str,
    baseline: str,
    command: Sequence[str],
) -> str:
    """A json: the command, and of each cell its overrides and runs.

    Of each run that is done: what it measured, the code that it was made with, its teacher and the
    weights that it began with, with their hashes, and that of its own.
    """
    content = {
        "command": shlex.join(command),
        "config_file": config_file,
        "baseline": baseline,
        "cells": {
            cell.name: {
                "overrides": list(cell.overrides),
                "runs": [_run(o) for o in outcomes if o.run.cell.name == cell.name],
            }
            for cell in cells
        },
    }
    # A class without objects has no AP.
    return json.dumps(without_nan(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _run(outcome: Outcome) -> dict[str, Any]:
    run, summary = outcome.run, outcome.summary
    entry: dict[str, Any] = {"seed": run.seed, "status": outcome.status}
    if not summary:
        return entry
    entry |= {key: summary[key] for key in _FACTS if key in summary}
    weights = run.folder / "model_final.pth"
    return entry | {"weights_sha256": file_sha256(weights) if weights.is_file() else None}

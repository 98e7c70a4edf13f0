"""The numbers of an analysis as tables of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..output import NO_VALUE, number
from ..page import Rows
from .numbers import GROUPS, OUTCOMES, REGIONS


def percent(value: float | None) -> str:
    return NO_VALUE if value is None else f"{100 * value:.0f} %"


def level_table(last: dict[str, Any]) -> Rows:
    header = ["level", "cells", "mean", "median", "90 %", "99 %", "cells above mean", "high / low"]
    return [header] + [
        [
            name,
            str(level["cells"]),
            *(number(level[key], ".3g") for key in ("mean", "median", "q90", "q99")),
            percent(level["high"]["share_of_cells"]),
            number(level["high"]["ratio"], ".3g"),
        ]
        for name, level in last["levels"].items()
    ]


def size_table(last: dict[str, Any]) -> Rows:
    return [["level", *REGIONS, "cells of " + ", ".join(REGIONS)]] + [
        [
            name,
            *(number(level["sizes"][region]["mean"], ".3g") for region in REGIONS),
            ", ".join(str(level["sizes"][region]["cells"]) for region in REGIONS),
        ]
        for name, level in last["levels"].items()
    ]


def time_table(checkpoints: Sequence[dict[str, Any]], key: str) -> Rows:
    """A row a checkpoint, a column a level.

    Args:
        key: "mean", "ratio" (of the high to the low region) or "rank_correlation_with_last".
    """
    names = list(checkpoints[-1]["levels"])
    return [["iterations", *names]] + [
        [
            str(point["iteration"]),
            *(
                number(level["high"][key] if key == "ratio" else level[key], ".3g")
                for level in point["levels"].values()
            ),
        ]
        for point in checkpoints
    ]


def error_table(last: dict[str, Any]) -> Rows:
    """Disparity inside boxes and in the background, in all and on each level."""
    return [["level", *OUTCOMES, "background"]] + [
        [name, *(number(row[key], ".3g") for key in (*OUTCOMES, "background"))]
        for name, row in last["errors"]["disparity"].items()
    ]


def auc_table(last: dict[str, Any]) -> Rows:
    header = ["disparity of", "AUC", "95 %", "missed", "detected"]
    return [header] + [
        [name, number(row["auc"], ".3g"), _span(row), str(row["missed"]), str(row["detected"])]
        for name, row in last["errors"]["auc"].items()
    ]


def high_table(last: dict[str, Any]) -> Rows:
    header = ["level", *GROUPS, "errors - image, points", "errors - detected, points"]
    return [header] + [
        [
            name,
            *(percent(row[group]) for group in GROUPS),
            *(_points(row[f"errors_minus_{other}"]) for other in ("image", "detected")),
        ]
        for name, row in last["errors"]["high_share"].items()
    ]


def _span(row: dict[str, Any]) -> str:
    return NO_VALUE if row["interval"] is None else "{:.2f} to {:.2f}".format(*row["interval"])


def _points(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return NO_VALUE
    value = f"{round(100 * row['value']):+d}"
    if row["interval"] is None:
        return value
    return value + " ({:+d} to {:+d})".format(*(round(100 * end) for end in row["interval"]))

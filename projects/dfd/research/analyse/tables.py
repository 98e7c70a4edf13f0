"""What the numbers say, as sentences and tables; nothing is presumed about their sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .numbers import ALL, GROUPS, OUTCOMES, REGIONS, SAME_BOTH, SAME_IMAGE, SAME_KIND

NO_VALUE = "–"
Rows = list[list[str]]


def number(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:.3g}"


def percent(value: float | None) -> str:
    return NO_VALUE if value is None else f"{100 * value:.0f} %"


def _extremes(values: dict[str, float | None], show=number) -> tuple[str, str] | None:
    """The lowest and the highest of some values with their names; None if there are not two."""
    known = sorted((v, k) for k, v in values.items() if v is not None)
    if len(known) < 2:
        return None
    return tuple(f"{show(value)} ({name})" for value, name in (known[0], known[-1]))


def level_table(last: dict[str, Any]) -> Rows:
    tops = list(next(iter(last["levels"].values()))["top_share"])
    header = ["level", "cells", "mean", "median", "90 %", "99 %"]
    header += [f"held by top {percent(float(top))}" for top in tops]
    header += ["cells above mean", "high / low"]
    return [header] + [
        [
            name,
            str(level["cells"]),
            *(number(level[key]) for key in ("mean", "median", "q90", "q99")),
            *(percent(level["top_share"][top]) for top in tops),
            percent(level["high"]["share_of_cells"]),
            number(level["high"]["ratio"]),
        ]
        for name, level in last["levels"].items()
    ]


def level_sentences(last: dict[str, Any]) -> list[str]:
    levels = last["levels"]
    sentences = []
    tenth = {name: level["top_share"]["0.1"] for name, level in levels.items()}
    if spread := _extremes(tenth, percent):
        sentences.append(
            f"The tenth of a level's cells with the highest disparity holds from {spread[0]} to "
            f"{spread[1]} of all its disparity; were it spread evenly, it would hold 10 %."
        )
    if spread := _extremes({name: level["mean"] for name, level in levels.items()}):
        sentences.append(f"Mean disparity goes from {spread[0]} to {spread[1]}.")
    return sentences


def size_table(last: dict[str, Any]) -> Rows:
    return [["level", *REGIONS, "cells of " + ", ".join(REGIONS)]] + [
        [
            name,
            *(number(level["sizes"][region]["mean"]) for region in REGIONS),
            ", ".join(str(level["sizes"][region]["cells"]) for region in REGIONS),
        ]
        for name, level in last["levels"].items()
    ]


def size_sentences(last: dict[str, Any]) -> list[str]:
    sentences = []
    above, known = [], 0
    for name, level in last["levels"].items():
        means = {region: level["sizes"][region]["mean"] for region in REGIONS}
        spread = _extremes(means)
        if spread and not sentences:
            sentences.append(f"On {name}, mean disparity goes from {spread[0]} to {spread[1]}.")
        total = [level["sizes"][r] for r in REGIONS[:-1] if level["sizes"][r]["cells"]]
        if not total or means["background"] is None:
            continue
        known += 1
        cells = sum(size["cells"] for size in total)
        if sum(size["mean"] * size["cells"] for size in total) / cells > means["background"]:
            above.append(name)
    if known:
        where = f" ({', '.join(above)})" if above else ""
        sentences.append(
            f"Inside labelled objects of all sizes it is above the background's on {len(above)} of "
            f"{known} levels{where}."
        )
    return sentences


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
                number(level["high"][key] if key == "ratio" else level[key])
                for level in point["levels"].values()
            ),
        ]
        for point in checkpoints
    ]


def time_sentences(checkpoints: Sequence[dict[str, Any]]) -> list[str]:
    first, last = checkpoints[0], checkpoints[-1]
    if first is last:
        return [
            "The run kept one checkpoint, so nothing can be said about training time "
            "(train.checkpointer.period keeps more)."
        ]
    span = f"From {first['iteration']} to {last['iteration']} iterations"
    changes = {
        name: level["mean"] / first["levels"][name]["mean"] - 1
        for name, level in last["levels"].items()
        if first["levels"][name]["mean"]
    }
    sentences = []
    if spread := _extremes(changes, lambda change: f"{100 * change:+.0f} %"):
        sentences.append(f"{span}, mean disparity changes by {spread[0]} to {spread[1]}.")
    ratios = {
        name: level["high"]["ratio"] / first["levels"][name]["high"]["ratio"] - 1
        for name, level in last["levels"].items()
        if level["high"]["ratio"] and first["levels"][name]["high"]["ratio"]
    }
    if ratios:
        grew = [name for name, change in ratios.items() if change > 0]
        where = f" ({', '.join(grew)})" if grew else ""
        sentences.append(
            "The high region's mean over the low region's, a measure of contrast, grew on "
            f"{len(grew)} of {len(ratios)} levels{where}."
        )
    likeness = {n: v["rank_correlation_with_last"] for n, v in first["levels"].items()}
    if spread := _extremes(likeness):
        sentences.append(
            f"The map after {first['iteration']} iterations has a rank correlation with the last "
            f"one of {spread[0]} to {spread[1]}, on the mean over images; 1 is the same order of "
            "cells, 0 none in common."
        )
    return sentences


def error_table(last: dict[str, Any]) -> Rows:
    """Disparity inside boxes and in the background, in all and on each level."""
    return [["level", *OUTCOMES, "background"]] + [
        [name, *(number(row[key]) for key in (*OUTCOMES, "background"))]
        for name, row in last["errors"]["disparity"].items()
    ]


def auc_table(last: dict[str, Any]) -> Rows:
    header = ["disparity of", "AUC", "95 %", "missed", "detected"]
    return [header] + [
        [name, number(row["auc"]), _span(row), str(row["missed"]), str(row["detected"])]
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


def error_sentences(last: dict[str, Any]) -> list[str]:
    errors = last["errors"]
    means = {k: number(v) for k, v in errors["disparity"][ALL].items()}
    sentences = [
        f"Mean disparity is {means['missed']} inside missed objects, {means['detected']} inside "
        f"detected ones, {means['false']} inside false detections and {means['background']} in "
        "the background."
    ]
    among = {
        ALL: "",
        SAME_KIND: " of the same class and size",
        SAME_IMAGE: " on the same image",
        SAME_BOTH: " of the same class and size on the same image",
    }
    sentences += [_auc_sentence(errors["auc"][name], which) for name, which in among.items()]
    sentences += _high_sentences(errors["high_share"][ALL])
    return sentences


def _auc_sentence(row: dict[str, Any], among: str) -> str:
    pair = f"a missed and a detected object{among}"
    if row["auc"] is None:
        return f"There is no pair of {pair} to compare."
    start = f"Of {pair}, the missed one has the higher disparity in {percent(row['auc'])} of pairs"
    if row["interval"] is None:
        return f"{start}; there are too few images for an interval."
    low, high = row["interval"]
    if low > 0.5:
        meaning = "high disparity goes with misses"
    elif high < 0.5:
        meaning = "high disparity goes with detections, not with misses"
    else:
        meaning = "the interval holds 50 %, so disparity was not seen to tell them apart"
    return f"{start} (95 % interval {percent(low)} to {percent(high)}): {meaning}."


def _high_sentences(row: dict[str, Any]) -> list[str]:
    if row["errors"] is None:
        return ["There is no error to look for in the high region."]
    sentences = []
    for other, what in (("image", "the image"), ("detected", "what was detected")):
        difference = row[f"errors_minus_{other}"]
        if difference["value"] is None:
            continue
        low, high = difference["interval"] or (-1.0, 1.0)
        verdict = "more" if low > 0 else "less" if high < 0 else "neither clearly more nor less"
        sentences.append(
            f"Of the area of errors, {percent(row['errors'])} has a disparity above its image's "
            f"mean, of {what} {percent(row[other])}: {verdict}."
        )
    return sentences

"""The numbers of an ablation: each run's, each cell's, and the paired differences."""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

from ...errors import UserError
from .cells import Cell
from .folders import CellRun

# Before a metric of the student's average, which train.ema keeps.
EMA = "ema/"
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
DONE, FAILED, OPEN = "done", "failed", "not run"
_CONFIDENCE, _POWER = 0.95, 0.8
BETTER, WORSE, UNSETTLED = "better", "worse", "not settled"


@dataclass(frozen=True)
class Outcome:
    """What became of a run. ``summary`` is empty unless it is done."""

    run: CellRun
    status: str
    summary: dict[str, Any]
    error: str = ""

    @property
    def scores(self) -> dict[str, float]:
        """The numbers of its boxes by name, with those of an EMA under ``EMA``.

        Those that are not defined are left out.
        """
        results = self.summary.get("results") or {}
        scores = dict(results.get("bbox") or {})
        average = (results.get("ema") or {}).get("bbox") or {}
        scores |= {f"{EMA}{key}": value for key, value in average.items()}
        return {k: v for k, v in scores.items() if v is not None and math.isfinite(v)}


@dataclass(frozen=True)
class Estimate:
    """From n values; a mean needs one, a (sample) standard deviation two."""

    n: int
    mean: float | None
    sd: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        return cls(
            len(values),
            statistics.fmean(values) if values else None,
            statistics.stdev(values) if len(values) > 1 else None,
        )

    @property
    def half_width(self) -> float | None:
        """Half the 95 % interval of the mean, by Student's t."""
        return self._in_errors(_quantile((1 + _CONFIDENCE) / 2, self.n))

    @property
    def visible(self) -> float | None:
        """The mean that so many values would tell from 0 in four of five experiments."""
        return self._in_errors(_visible(self.n)) if self.sd else None

    @property
    def p_value(self) -> float | None:
        """Of the mean against 0, two-sided, by Student's t."""
        if self.sd is None:
            return None
        if self.sd == 0:
            return 1.0  # Without any spread nothing tells how much chance there is.
        return float(2 * stats.t.sf(abs(self.mean) / (self.sd / math.sqrt(self.n)), self.n - 1))

    def _in_errors(self, quantile: float) -> float | None:
        return None if self.sd is None else quantile * self.sd / math.sqrt(self.n)


def _quantile(share: float, n: int) -> float:
    return float(stats.t.ppf(share, n - 1)) if n > 1 else math.nan


@functools.cache
def _visible(n: int) -> float:
    """The mean in standard errors that a t test of n values finds with the power wanted."""
    if n < 2:
        return math.nan
    # Over the spreads that n values may turn out to have; scipy's noncentral t fails for two.
    shares = (np.arange(20_000) + 0.5) / 20_000
    spread = np.sqrt(stats.chi2.ppf(shares, n - 1) / (n - 1))
    limit = _quantile((1 + _CONFIDENCE) / 2, n) * spread

    def lacking(mean: float) -> float:
        found = stats.norm.cdf(mean - limit) + stats.norm.cdf(-mean - limit)
        return float(found.mean()) - _POWER

    return float(optimize.brentq(lacking, 1.0, 100.0))


@dataclass(frozen=True)
class CellResult:
    """One cell's numbers.

    Args:
        values: of the compared metric, by seed.
        scores: of each shown metric over its runs.
        differences: to the baseline of the compared metric, by the seeds that both have; None: it
            is the baseline.
    """

    cell: Cell
    values: dict[int, float]
    scores: dict[str, Estimate]
    differences: dict[int, float] | None

    @property
    def difference(self) -> Estimate:
        return Estimate.of(list((self.differences or {}).values()))

    @property
    def wins(self) -> int:
        """In how many pairs the cell was better than the baseline."""
        return sum(value > 0 for value in (self.differences or {}).values())


def read_outcomes(runs: Sequence[CellRun], errors: Mapping[str, str]) -> list[Outcome]:
    """What became of runs, with the errors of those that failed by their names."""
    outcomes = []
    for run in runs:
        summary = run.summary()
        if run.name in errors:
            outcomes.append(Outcome(run, FAILED, {}, errors[run.name]))
        else:
            outcomes.append(Outcome(run, OPEN if summary is None else DONE, summary or {}))
    return outcomes


def check_metric(metric: str) -> None:
    """Raise a UserError if a metric cannot be one of box detection."""
    plain = metric.removeprefix(EMA)
    if plain not in METRICS and not plain.startswith("AP-"):
        raise UserError(
            f"--metric {metric}: it must be {', '.join(METRICS)} or AP-<class>, or one of these "
            f"behind {EMA} for the average of train.ema"
        )


def compare(
    outcomes: Sequence[Outcome], cells: Sequence[Cell], *, baseline: Cell, metric: str
) -> list[CellResult]:
    """Each cell's numbers, in the cells' order.

    Raises:
        UserError: runs are done, but none has the metric.
    """
    known = dict.fromkeys(key for outcome in outcomes for key in outcome.scores)
    if any(outcome.status == DONE for outcome in outcomes) and metric not in known:
        there = ", ".join(known) or "no box AP at all"
        raise UserError(f"--metric {metric}: no run has it; they have {there}")
    by_cell = {
        cell.name: {o.run.seed: o.scores for o in outcomes if o.run.cell.name == cell.name}
        for cell in cells
    }
    reference = _values(by_cell[baseline.name], metric)
    results = []
    for cell in cells:
        values = _values(by_cell[cell.name], metric)
        pairs = {
            seed: value - reference[seed] for seed, value in values.items() if seed in reference
        }
        scores = {
            key: Estimate.of(list(_values(by_cell[cell.name], key).values()))
            for key in shown_metrics(metric)
        }
        results.append(CellResult(cell, values, scores, None if cell is baseline else pairs))
    return results


@dataclass(frozen=True)
class Details:
    """What else there is to a cell, as means over its runs; None: not measured.

    Args:
        sizes: APs, APm and APl.
        recovered: the share of the teacher's lead over the baseline, of the mean AP of the seeds
            that both have; None too where no run has measured its teacher, or that is not ahead.
        seconds, memory: per iteration and at the peak, over the baseline's, of the same seeds.
    """

    sizes: dict[str, float | None]
    recovered: float | None
    seconds: float | None
    memory: float | None


def details(
    outcomes: Sequence[Outcome], cells: Sequence[Cell], *, baseline: Cell, metric: str
) -> dict[str, Details]:
    """Of each cell, by name."""
    runs = {
        cell.name: {
            o.run.seed: o for o in outcomes if o.run.cell.name == cell.name and o.status == DONE
        }
        for cell in cells
    }
    leads = _teachers(outcomes, metric.removeprefix(EMA))
    of = EMA if metric.startswith(EMA) else ""
    reference = _values({s: o.scores for s, o in runs[baseline.name].items()}, metric)
    found = {}
    for cell in cells:
        own = runs[cell.name]
        scores = {seed: o.scores for seed, o in own.items()}
        # Of the same seeds, as the difference that stands in the table.
        values = _values(scores, metric)
        pairs = values.keys() & reference.keys()
        ap, plain = (_mean([found[seed] for seed in pairs]) for found in (values, reference))
        measured = {_teacher(o) for o in own.values()} & set(leads)
        teacher = _mean([_mean(leads[one]) for one in measured])
        ahead = None not in (ap, plain, teacher) and teacher > plain
        ratios = [
            _mean(
                [
                    o.summary[key] / runs[baseline.name][seed].summary[key]
                    for seed, o in own.items()
                    if seed in runs[baseline.name]
                    and o.summary.get(key)
                    and runs[baseline.name][seed].summary.get(key)
                ]
            )
            for key in ("seconds_per_iteration", "peak_memory_mib")
        ]
        found[cell.name] = Details(
            {size: _mean(_values(scores, f"{of}{size}").values()) for size in METRICS[3:]},
            (ap - plain) / (teacher - plain) if ahead else None,
            *ratios,
        )
    return found


def _teacher(outcome: Outcome) -> tuple[str | None, str]:
    """What tells a run's teacher from others as it is measured: its file, form, and test images.

    One file is another teacher at another ``scale``.
    """
    settings = outcome.run.settings
    teacher = dict((settings.get("model") or {}).get("teacher") or {})
    teacher.pop("checkpoint", None)  # The content counts.
    test = (settings.get("dataloader") or {}).get("test")
    facts = outcome.summary.get("teacher") or {}
    return facts.get("sha256"), _text([teacher, test])


def _teachers(
    outcomes: Sequence[Outcome], metric: str
) -> dict[tuple[str | None, str], list[float]]:
    """What teachers score on the test data, of each run that has measured it."""
    found: dict[tuple[str | None, str], list[float]] = {}
    for outcome in outcomes:
        value = (outcome.summary.get("teacher") or {}).get(metric, math.nan)
        if math.isfinite(value):
            found.setdefault(_teacher(outcome), []).append(value)
    return found


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.fmean(values) if values else None


def verdicts(results: Sequence[CellResult]) -> dict[str, str]:
    """By the cell's name, whether its difference to the baseline is settled.

    The error is 5 % for all cells together, by Holm's correction. A cell with fewer than two pairs
    has no verdict.
    """
    tested = [r for r in results if r.difference.sd is not None]
    said = {r.cell.name: UNSETTLED for r in tested}
    by_p_value = sorted(tested, key=lambda r: r.difference.p_value)
    for i, result in enumerate(by_p_value):
        if result.difference.p_value > (1 - _CONFIDENCE) / (len(tested) - i):
            break
        said[result.cell.name] = BETTER if result.difference.mean > 0 else WORSE
    return said


def shown_metrics(metric: str) -> list[str]:
    """The compared metric, then what stands beside it."""
    return [metric, *(key for key in METRICS[:3] if key != metric)]


def _values(scores: Mapping[int, Mapping[str, float]], metric: str) -> dict[int, float]:
    return {seed: found[metric] for seed, found in scores.items() if metric in found}


def no_difference(results: Sequence[CellResult]) -> list[str]:
    """Cells whose every run measured what the baseline's did: they had no effect on it."""
    # Two students that find nothing are no sign of that.
    same = [
        r.cell.name
        for r in results
        if r.differences and not any(r.differences.values()) and any(r.values.values())
    ]
    return [
        f"the results of {name} are those of the baseline on every seed: what it sets has no "
        "effect on the student that is measured"
        for name in same
    ]


def average_is_not_compared(outcomes: Sequence[Outcome], metric: str) -> list[str]:
    """Whether runs keep an average of the student, which the tables are not about."""
    names = dict.fromkeys(o.run.cell.name for o in outcomes if f"{EMA}AP" in o.scores)
    if not names or metric.startswith(EMA):
        return []
    return [
        f"{', '.join(names)} kept an average of the student (train.ema): the tables are of the "
        f"student itself, --metric {EMA}{metric} compares the averages"
    ]


def different_conditions(outcomes: Sequence[Outcome]) -> list[str]:
    """What is not the same in runs that are done, though no cell changed it."""
    summaries = [outcome.summary for outcome in outcomes if outcome.status == DONE]
    notes = []
    for key in ("device", "processor", "threads", "processes", "torch", "detectron2"):
        found = list(dict.fromkeys(str(s[key]) for s in summaries if s.get(key) is not None))
        if len(found) > 1:
            notes.append(f"the runs differ in {key}: {', '.join(found)}")
    notes += _other_training_data(outcomes)
    if len({s["test_data"] for s in summaries if s.get("test_data")}) > 1:
        notes.append("the labels of the test data were changed between runs: AP do not compare")
    code = {s["code"]["sha256"]: s["code"]["commit"] for s in summaries if s.get("code")}
    if len(code) > 1:
        versions = ", ".join(
            commit or f"no commit, sha256 {sha256}" for sha256, commit in code.items()
        )
        notes.append(f"the runs differ in this project's code: {versions}")
    for key, what in (
        ("teacher", "the teacher"),
        ("start", "train.init_checkpoint"),
        ("pretrained", "the trunk's weight file"),
    ):
        files: dict[str, set[str]] = {}
        for said in (s[key] for s in summaries if s.get(key)):
            for file in said if isinstance(said, list) else [said]:
                files.setdefault(file["path"], set()).add(file["sha256"])
        notes += [
            f"{what} {path} was replaced between runs: their hashes differ"
            for path, hashes in files.items()
            if len(hashes) > 1
        ]
    return notes


def _other_training_data(outcomes: Sequence[Outcome]) -> list[str]:
    """Runs that were to train on the same data, and did not: their files have changed."""
    hashes: dict[str, set[str]] = {}
    counts: dict[str, dict[str, dict[str, None]]] = {}  # Cells by their number of images.
    for outcome in outcomes:
        if outcome.status != DONE:
            continue
        train = (outcome.run.settings.get("dataloader") or {}).get("train") or {}
        data, summary = _text([train.get("dataset"), train.get("unlabelled")]), outcome.summary
        if summary.get("train_data"):
            hashes.setdefault(data, set()).add(summary["train_data"])
        if summary.get("train_images") is not None:
            cells = counts.setdefault(data, {}).setdefault(str(summary["train_images"]), {})
            cells[outcome.run.cell.name] = None
    notes = []
    if any(len(found) > 1 for found in hashes.values()):
        notes.append("the training data were changed between runs: other images or labels")
    for found in counts.values():
        if len(found) > 1:
            cells = dict.fromkeys(cell for names in found.values() for cell in names)
            notes.append(
                f"the runs of {', '.join(cells)} differ in their number of training images: "
                f"{', '.join(found)}"
            )
    return notes


def _text(settings: Any) -> str:
    return json.dumps(settings, default=str)


def run_table(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """Every run with its numbers; the first row is the header."""
    columns = list(dict.fromkeys(key for o in outcomes for key in o.run.cell.columns))
    found = list(dict.fromkeys(key for o in outcomes for key in o.scores))
    scores = [key for key in METRICS if key in found or key in METRICS[:3]]
    scores += [key for key in found if key not in METRICS]
    costs = ["seconds_per_iteration", "peak_memory_mib"]
    rows = [["cell", "seed", "status", *columns, *scores, *costs, "error"]]
    for outcome in outcomes:
        run = outcome.run
        numbers = [outcome.scores.get(key) for key in scores]
        numbers += [outcome.summary.get(key) for key in costs]
        rows.append(
            [
                run.cell.name,
                str(run.seed),
                outcome.status,
                *(run.cell.columns.get(key, "") for key in columns),
                *("" if number is None else f"{number:.6g}" for number in numbers),
                outcome.error,
            ]
        )
    return rows


def to_csv(rows: Sequence[Sequence[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()

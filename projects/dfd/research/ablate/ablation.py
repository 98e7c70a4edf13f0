"""An ablation from its arguments to its results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ...engine.config.grammar import split_override
from ...engine.config.load import ConfigFile
from ...engine.console import Interrupted, LiveLine, say
from .bootstrap import image_intervals
from .cells import Cell
from .cluster import ClusterRuns, check_cluster
from .estimates import (
    FAILED,
    OPEN,
    Outcome,
    average_is_not_compared,
    compare,
    details,
    different_conditions,
    no_difference,
    read_outcomes,
    run_table,
    to_csv,
)
from .folders import CellRun, check_earlier, locked, other_runs, write_whole
from .local import UNFINISHED, Launcher, LocalRuns, describe_places, environments, make_jobs
from .manifest import manifest
from .progress import Progress
from .tables import (
    DETAILS_NOTE,
    detail_table,
    draw_results,
    explanation,
    render_page,
    result_table,
    to_markdown,
)
from .without_effect import without_effect

_LINE_EVERY = 30.0
_POLL_EVERY = 0.5


@dataclass(frozen=True)
class Ablation:
    """What is run and compared.

    Args:
        runs: as ``plan_runs`` gives them.
        program: what trains, to which ``--config-file`` and overrides are given.
        command: how it was called, for the manifest.
        parallel, processes: runs at a time, and processes of each.
        draws: of the test images, see ``bootstrap.image_intervals``.
        cluster: None: processes of this machine.
        parameters: of the cluster's jobs.
    """

    config: ConfigFile
    out: Path
    cells: Sequence[Cell]
    runs: Sequence[CellRun]
    baseline: Cell
    metric: str
    draws: int = 0
    command: Sequence[str] = ()
    program: Sequence[str] = (sys.executable, "-m", "dfd", "train")
    parallel: int = 1
    processes: int = 1
    cluster: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """The cells, what each changes, and how much of it is done."""
        base = self.config.load()
        seeds = ", ".join(str(seed) for seed in dict.fromkeys(run.seed for run in self.runs))
        done = {run.name for run in self.runs if run.summary() is not None}
        lines = [f"{len(self.runs)} runs: {len(self.cells)} cells, seeds {seeds}; {len(done)} done"]
        for name, overrides in self._changes():
            own = [run.name for run in self.runs if run.cell.name == name]
            notes = ["baseline"] if name == self.baseline.name else []
            notes += [f"{len(done.intersection(own))} of {len(own)} done"] if own else []
            lines += ["", f"{name} ({', '.join(notes)})" if notes else name]
            lines += [f"    {_change(base, text)}" for text in overrides] or ["    no change"]
        return "\n".join([*lines, *(f"\n{note}" for note in self.doubts), "", *self._places()])

    @cached_property
    def doubts(self) -> list[str]:
        """What speaks against the comparison before anything is run."""
        return [f"Note: {note}." for note in without_effect(self.config, self.cells)]

    def _places(self) -> list[str]:
        """Where the runs will be."""
        if self.cluster == "slurm":
            each = f", {self.processes} processes each" if self.processes > 1 else ""
            return [f"on Slurm, at most {self.parallel} jobs at a time{each}"]
        at_once = len(self.runs) if self.cluster else min(self.parallel, len(self.runs))
        lines = [f"{at_once} at a time, each in the first place that is free:"]
        return lines + [f"    {line}" for line in describe_places(at_once, self.processes)]

    def _changes(self) -> list[tuple[str, list[str]]]:
        """The overrides that all cells share, if any, and then each cell's own."""
        first, *others = self.cells
        shared = [text for text in first.overrides if all(text in o.overrides for o in others)]
        if not shared or not others:
            return [(cell.name, list(cell.overrides)) for cell in self.cells]
        own = [(c.name, [text for text in c.overrides if text not in shared]) for c in self.cells]
        return [("every cell", shared), *own]

    def execute(self) -> list[Outcome]:
        """Make the runs that are not done, and write the results.

        Returns:
            What became of every run.

        Raises:
            UserError: nothing was started, as something would be overwritten or mixed.
            Interrupted: by a signal; what ran has been ended and the results so far are written.
        """
        if self.cluster:
            check_cluster(cluster=self.cluster, parameters=self.parameters, parallel=self.parallel)
        environments(1, self.processes)  # Refused before anything is written.
        with locked(self.out):
            check_earlier(self.runs)
            errors: dict[str, str] = {}
            try:
                self._run(errors)
            except Interrupted:
                # At once: the images are drawn when the same command is done.
                self._write(read_outcomes(self.runs, errors), draws=0)
                raise
            outcomes = read_outcomes(self.runs, errors)
            self._write(outcomes, draws=self.draws)
        return outcomes

    def _run(self, errors: dict[str, str]) -> None:
        """Make the runs; the errors of those that fail are filled in by name."""
        open_runs = [run for run in self.runs if run.summary() is None]
        skipped = len(self.runs) - len(open_runs)
        say(f"{len(self.runs)} runs, {skipped} of them done before; logs in {self.out}/<cell>")
        for line in self._left_out():
            say(line)
        for run in open_runs:
            if run.folder.exists():
                say(f"{run.name} was not finished: it goes on from what is in {run.folder}")
        self._write_csv(errors)
        if not open_runs:
            return
        progress = Progress(total=len(self.runs), done=skipped)

        def ended(run: CellRun, error: str | None) -> None:
            if error == UNFINISHED:
                progress.leave()
            else:
                progress.add(failed=error is not None)
            if error not in (None, UNFINISHED):
                errors[run.name] = error
            self._write_csv(errors)
            say(self._ended(run, error))

        _follow(self._launcher(open_runs), progress, ended, count=len(open_runs))

    def _left_out(self) -> list[str]:
        others = other_runs(self.runs, self.out)
        if not others:
            return []
        shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        return [
            f"Left out: {len(others)} finished runs in {self.out} that this command does "
            f"not name ({shown}): name all cells and seeds that are to be compared."
        ]

    def _ended(self, run: CellRun, error: str | None) -> str:
        if error == UNFINISHED:
            return f"{run.name} {UNFINISHED}"
        if error is not None:
            return f"{run.name}: failed: {error}"
        score = read_outcomes([run], {})[0].scores.get(self.metric)
        return f"{run.name}: done" + ("" if score is None else f", {self.metric} {score:.2f}")

    def _launcher(self, runs: Sequence[CellRun]) -> Launcher:
        many = ("--num-gpus", str(self.processes)) if self.processes > 1 else ()
        program = (*self.program, *many)
        jobs = make_jobs(runs, program=program, config_file=self.config.path)
        if self.cluster is None:
            return LocalRuns(jobs, parallel=self.parallel, processes=self.processes)
        return ClusterRuns(
            jobs,
            cluster=self.cluster,
            parameters=self.parameters,
            parallel=self.parallel,
            processes=self.processes,
            folder=self.out / "submitit",
        )

    def _write_csv(self, errors: dict[str, str]) -> None:
        rows = run_table(read_outcomes(self.runs, errors))
        write_whole(self.out / "results.csv", to_csv(rows))

    def _write(self, outcomes: Sequence[Outcome], *, draws: int) -> None:
        """All results of what is done."""
        write_whole(self.out / "results.csv", to_csv(run_table(outcomes)))
        results = compare(outcomes, self.cells, baseline=self.baseline, metric=self.metric)
        about = {"baseline": self.baseline.name, "metric": self.metric}
        over_images, reason = image_intervals(outcomes, results, draws=draws, **about)
        rows = result_table(results, metric=self.metric, over_images=over_images)
        said = explanation(draws=draws if over_images else 0, **about)
        notes = [said, *([reason] if reason else []), *_notes(outcomes), *self._left_out()]
        more_notes = [*no_difference(results), *average_is_not_compared(outcomes, self.metric)]
        notes += [f"Note: {note}." for note in more_notes] + self.doubts
        plot = draw_results(results, metric=self.metric)
        found = details(outcomes, self.cells, baseline=self.baseline, metric=self.metric)
        more = detail_table(found)
        write_whole(self.out / "results.md", to_markdown(rows, *notes, more, DETAILS_NOTE))
        write_whole(self.out / "results.png", plot)
        page = render_page(
            title=f"Ablation of {self.config.path}",
            rows=rows,
            notes=notes,
            plot=plot,
            more=more,
            outcomes=outcomes,
            overrides=self._changes(),
        )
        write_whole(self.out / "results.html", page)
        record = manifest(
            outcomes,
            self.cells,
            config_file=self.config.path,
            baseline=self.baseline.name,
            command=self.command,
        )
        write_whole(self.out / "manifest.json", record)


def _follow(
    launcher: Launcher,
    progress: Progress,
    ended: Callable[[CellRun, str | None], None],
    *,
    count: int,
) -> None:
    """Wait for so many runs and show the progress; whatever happens, nothing is left running.

    Args:
        ended: called with each run that ends, and its error if it failed.
    """
    live = LiveLine(line_every=_LINE_EVERY)
    try:
        while True:
            for run, error in launcher.poll():
                count -= 1
                live.clear()
                ended(run, error)
            if count == 0:
                return
            live.update(progress.text(launcher.running()))
            time.sleep(_POLL_EVERY)
    finally:
        launcher.close()
        live.clear()


def _change(base: DictConfig, text: str) -> str:
    """An override, with what the config has in its place."""
    before = OmegaConf.select(base, split_override(text)[1], default="not set")
    if isinstance(before, DictConfig) and "_target_" in before:
        target = before["_target_"]
        before = getattr(target, "__name__", str(target).rpartition(".")[2]) + "(...)"
    key, _, after = text.partition("=")
    before = "null" if before is None else "''" if before == "" else before
    return f"{key}: {before} -> {after}"


def _notes(outcomes: Sequence[Outcome]) -> list[str]:
    """What a reader of the table must know beside its numbers."""
    notes = [f"Note: {note}." for note in different_conditions(outcomes)]
    count = sum(outcome.status == OPEN for outcome in outcomes)
    if count:
        notes.append(f"Not complete: {count} of {len(outcomes)} runs have not been made.")
    return notes + [f"Failed: {o.run.name}: {o.error}" for o in outcomes if o.status == FAILED]

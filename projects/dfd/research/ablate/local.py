"""Runs as processes of this machine, some at a time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

import dfd

from ...engine.config.grammar import override
from ...engine.console import end, start
from ...engine.stop import EXIT_STOPPED, STOP_SIGNALS
from ...errors import UserError, first_line
from .folders import CellRun, open_log, prepare, tail

UNFINISHED = "was told to stop; the same command continues it"
# Told by itself, by the system, and by a shell in between.
_STOPPED = {EXIT_STOPPED, *(-n for n in STOP_SIGNALS), *(128 + n for n in STOP_SIGNALS)}
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Job:
    """A run and the command that makes it: a program with its config, and the overrides."""

    run: CellRun
    program: tuple[str, ...]
    overrides: tuple[str, ...]

    def command(self, *, resume: bool) -> list[str]:
        return [*self.program, *(["--resume"] if resume else []), *self.overrides]


class Launcher(Protocol):
    """What runs jobs: here, or on a cluster."""

    def poll(self) -> list[tuple[CellRun, str | None]]:
        """The runs that ended since the last call, each with its error if it failed.

        ``UNFINISHED`` is not one: the run was told to stop.
        """

    def running(self) -> list[CellRun]:
        """What runs at present."""

    def close(self) -> None:
        """End what still runs."""


def make_jobs(
    runs: Sequence[CellRun], *, program: Sequence[str], config_file: str
) -> list[Job]:
    """The command of each run: the program, its config and its overrides."""
    return [
        Job(
            run,
            (*program, "--config-file", config_file),
            (
                *run.cell.overrides,
                override("train.seed", run.seed),
                override("train.output_dir", run.folder),
            ),
        )
        for run in runs
    ]


def start_job(job: Job, env: Mapping[str, str]) -> subprocess.Popen:
    """Start a run, or let it go on from what an earlier attempt left.

    Raises:
        UserError: a process of an earlier attempt still has its log.
        OSError: it cannot be started.
    """
    with open_log(job.run) as log:
        return start(job.command(resume=prepare(job.run)), output=log, env=env)


def environments(parallel: int, processes: int = 1) -> list[dict[str, str]]:
    """The environment of each of so many runs at a time: its threads, and its CUDA devices.

    Args:
        processes: of each run, which has a device for each.

    Raises:
        UserError: there are devices, and fewer than the processes of one run.
    """
    env = dict(os.environ)
    package = str(Path(dfd.__file__).parents[1])
    if package not in sys.path:
        # Of an editable install, which a folder named dfd in the working directory would hide.
        paths = [package, *filter(None, [env.get("PYTHONPATH")])]
        env["PYTHONPATH"] = os.pathsep.join(paths)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    share = (processors or os.cpu_count()) // (parallel * processes)
    env.setdefault("OMP_NUM_THREADS", str(max(1, share)))
    devices = _devices(env)
    if not devices:
        return [env] * parallel
    if processes > len(devices):
        raise UserError(
            f"--processes {processes}: a process has a CUDA device of its own, and there are "
            f"{len(devices)}: take fewer"
        )
    # Groups of devices; more runs than groups share them in turn.
    groups = [devices[i : i + processes] for i in range(0, len(devices), processes)]
    groups = [group for group in groups if len(group) == processes]
    return [
        env | {"CUDA_VISIBLE_DEVICES": ",".join(groups[i % len(groups)])} for i in range(parallel)
    ]


def _devices(env: Mapping[str, str]) -> list[str]:
    """The CUDA devices that runs may have, by their names in CUDA_VISIBLE_DEVICES."""
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(i) for i in range(torch.cuda.device_count())]
    return [name for name in visible.split(",") if name.strip()]


def describe_places(parallel: int, processes: int) -> list[str]:
    """Where the runs that are made at a time will be, a line for each place."""
    lines = []
    for number, env in enumerate(environments(parallel, processes), 1):
        devices = env.get("CUDA_VISIBLE_DEVICES") if _devices(env) else None
        where = f"CUDA device {devices}" if devices else "the CPU, unless train.device is another"
        many = f"{processes} processes, " if processes > 1 else ""
        lines.append(f"place {number}: {where}; {many}threads: {env['OMP_NUM_THREADS']}")
    return lines


def failure(run: CellRun, code: int | None) -> str | None:
    """Why a run that ended is not done, from its log; None if it is done.

    Args:
        code: of its exit, if it is known.

    Returns:
        ``UNFINISHED`` if it did nothing wrong.
    """
    if run.summary() is not None:
        return None
    if code in _STOPPED:
        return UNFINISHED
    lines = [_ANSI.sub("", line).strip() for line in tail(run.log)]
    lines = [line for line in lines if line]
    errors = [line for line in lines if line.startswith("error: ")]
    said = errors[-1].removeprefix("error: ") if errors else lines[-1] if lines else "said nothing"
    if code is not None and code < 0:
        return f"ended by signal {-code} ({signal.strsignal(-code)}); last line: {said}"
    return f"ended without summary.json; last line: {said}" if code == 0 else said


def not_started(error: Exception) -> str:
    """What is told of a run that could not be started."""
    return f"not started: {first_line(error)}"


class LocalRuns:
    """Runs jobs in their order, ``parallel`` at a time, each in the first place that is free."""

    def __init__(self, jobs: Sequence[Job], *, parallel: int, processes: int = 1) -> None:
        self._waiting = deque(jobs)
        self._environments = environments(parallel, processes)
        self._slots: list[tuple[Job, subprocess.Popen] | None] = [None] * parallel

    def poll(self) -> list[tuple[CellRun, str | None]]:
        ended = []
        for i, slot in enumerate(self._slots):
            if slot is not None:
                job, process = slot
                code = process.poll()
                if code is None:
                    continue
                ended.append((job.run, failure(job.run, code)))
                self._slots[i] = None
            while self._waiting and self._slots[i] is None:
                job = self._waiting.popleft()
                try:
                    self._slots[i] = (job, start_job(job, self._environments[i]))
                except (OSError, UserError) as error:
                    ended.append((job.run, not_started(error)))
        return ended

    def running(self) -> list[CellRun]:
        return [slot[0].run for slot in self._slots if slot is not None]

    def close(self) -> None:
        end(*(slot[1] for slot in self._slots if slot is not None))

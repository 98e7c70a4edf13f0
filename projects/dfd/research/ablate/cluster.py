"""Runs as one job array through submitit: on Slurm, or on this machine to try it out."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...engine.console import end
from ...engine.stop import handled
from ...errors import UserError, first_line
from .folders import CellRun, check_earlier, open_log
from .local import Job, environments, failure, not_started, start_job

CLUSTERS = ("local", "slurm")
# submitit's general parameters; the others take the cluster's prefix.
_GENERAL = ("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node")
# submitit's own limit is minutes; on this machine there is to be none.
_NO_LIMIT_MIN = 60 * 24 * 365
_GRACE_SECONDS = 15.0
# For what runs to save itself, when the jobs are cancelled.
_SAVE_SECONDS = 60.0


def parse_slurm(text: str) -> dict[str, Any]:
    """``partition=gpu timeout_min=600`` as parameters of submitit.

    Raises:
        UserError: of another form, or without a time limit.
    """
    parameters: dict[str, Any] = {}
    for part in shlex.split(text):
        key, equals, value = part.partition("=")
        if not key or not equals:
            raise UserError(f"--slurm {text}: {part} must be key=value")
        key = key.removeprefix("slurm_")
        parameters[key if key in _GENERAL else f"slurm_{key}"] = _number(value)
    if not {"timeout_min", "slurm_time"} & set(parameters):
        raise UserError(
            "--cluster slurm needs --slurm 'timeout_min=...', the minutes that a run may take: "
            "submitit would end it after 5"
        )
    return parameters


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def check_cluster(*, cluster: str, parameters: Mapping[str, Any], parallel: int) -> None:
    """Raise a UserError if submitit is not there or does not take the parameters."""
    with tempfile.TemporaryDirectory() as folder:
        _executor(Path(folder), cluster, parameters, parallel)


def _executor(folder: Path, cluster: str, parameters: Mapping[str, Any], parallel: int) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise UserError(
            f"--cluster {cluster} needs submitit: pip install -e '.[cluster]'"
        ) from error
    own = {"slurm_array_parallelism": parallel} if cluster == "slurm" else {}
    limit = {"timeout_min": _NO_LIMIT_MIN} if cluster == "local" else {}
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**({"name": "ablate"} | limit | own | dict(parameters)))
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--cluster {cluster}: submitit: {first_line(error)}") from error
    return executor


def run_job(job: Job, env: Mapping[str, str] | None) -> str | None:
    """What a job of the array does; returns why the run failed, None if it is done.

    Args:
        env: the environment of the run; None: that of the job.
    """
    try:
        # Since it was submitted, another may have been at the same run.
        check_earlier([job.run])
        if job.run.summary() is not None:
            return None
        with _without_submitits_signal():
            process = start_job(job, env)
    except UserError as error:
        return str(error)
    except OSError as error:
        return not_started(error)
    _processes.append(process)
    try:
        # Not by wait(), within which the handler of a signal could not see that it ends.
        while process.poll() is None:
            time.sleep(0.2)
    finally:
        end(process)
        _processes.remove(process)
    return failure(job.run, process.returncode)


def _go_on_later(job: Job, env: Mapping[str, str] | None) -> Any:
    """What submitit calls when the job's time is over or it is preempted; it then queues it again.

    The run saves what it has done, and goes on from there.
    """
    import submitit

    end(*_processes)
    return submitit.helpers.DelayedSubmission(run_job, job, env)


_processes: list[subprocess.Popen] = []  # This job's.
run_job.checkpoint = _go_on_later


@contextlib.contextmanager
def _without_submitits_signal() -> Iterator[None]:
    """What is started within the context does not hear the signal by which submitit is told.

    A cluster sends it to all processes of a job, and a training would be ended by it unsaved.
    """
    number = getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}", None)
    with handled([] if number is None else [number], signal.SIG_IGN):
        yield


class ClusterRuns:
    """One array of all jobs, which the cluster runs when it can."""

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        cluster: str,
        parameters: Mapping[str, Any],
        parallel: int,
        folder: Path,
        processes: int = 1,
    ) -> None:
        """
        Args:
            parameters: of submitit, as ``parse_slurm`` gives them.
            parallel: jobs that run at once, on Slurm; here all of them do.
            folder: for what submitit writes.
            processes: of each run.
        """
        executor = _executor(folder, cluster, parameters, parallel)
        self._active: list[tuple[CellRun, Any]] = []
        self._refused: list[tuple[CellRun, str | None]] = []
        if cluster == "local":
            # One by one, as submitit does it here: one that cannot be started stops no other.
            for job, env in zip(jobs, environments(len(jobs), processes), strict=True):
                self._submit([job], lambda env=env, job=job: [executor.submit(run_job, job, env)])
        else:
            self._submit(jobs, lambda: executor.map_array(run_job, jobs, [None] * len(jobs)))

    def _submit(self, jobs: Sequence[Job], submit: Callable[[], list[Any]]) -> None:
        runs = [job.run for job in jobs]
        try:
            self._active += zip(runs, submit(), strict=True)
        except (OSError, RuntimeError) as error:
            self._refused += [(run, f"not submitted: {first_line(error)}") for run in runs]

    def poll(self) -> list[tuple[CellRun, str | None]]:
        ended, self._refused = self._refused, []
        active = []
        for run, handle in self._active:
            if handle.done():
                ended.append((run, self._error(run, handle)))
            else:
                active.append((run, handle))
        self._active = active
        return ended

    @staticmethod
    def _error(run: CellRun, handle: Any) -> str | None:
        try:
            failed = handle.exception() is not None
        except Exception as error:  # What it has left cannot be read.
            return failure(run, None) and f"job {handle.job_id}: {first_line(error)}"
        if failed:  # The job itself failed: killed, out of time or memory.
            reason = failure(run, None)
            return reason and f"job {handle.job_id} ended as {handle.state}; last line: {reason}"
        error = handle.result()
        if error is None:
            _wait_for_summary(run)
        return error or failure(run, None)

    def running(self) -> list[CellRun]:
        return [run for run, handle in self._active if handle.state == "RUNNING"]

    def close(self) -> None:
        active = [handle for _, handle in self._active if not handle.done()]
        for handle in active:
            handle.cancel(check=False)
        deadline = time.monotonic() + _SAVE_SECONDS
        while time.monotonic() < deadline and not all(handle.done() for handle in active):
            time.sleep(0.2)
        # A job may end before its run has saved what it has done.
        while time.monotonic() < deadline and any(
            map(_is_trained, (run for run, _ in self._active))
        ):
            time.sleep(0.2)


def _is_trained(run: CellRun) -> bool:
    """Whether a process of the run is still there."""
    if not run.log.exists():
        return False
    try:
        open_log(run, truncate=False).close()
    except UserError:
        return True
    except OSError:
        pass
    return False


def _wait_for_summary(run: CellRun) -> None:
    """A network file system may show what a node wrote only after a while."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while run.summary() is None and time.monotonic() < deadline:
        time.sleep(0.5)

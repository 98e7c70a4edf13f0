"""Runs as one job array through submitit: on Slurm, or on this machine to try it out."""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..console import end
from ..errors import UserError, first_line
from .launch import Job, environments, failure, start_job
from .runs import CellRun, check_earlier

CLUSTERS = ("local", "slurm")
# Of submitit, the parameters that are no cluster's own; the others take the cluster's prefix.
_GENERAL = ("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node")
# submitit's own limit is minutes; on this machine there is to be none.
_NO_LIMIT_MIN = 60 * 24 * 365
_GRACE_SECONDS = 15.0


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
        process = start_job(job, env)
    except UserError as error:
        return str(error)
    try:
        code = process.wait()
    finally:
        end(process)
    return failure(job.run, code)


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
    ) -> None:
        """
        Args:
            parameters: of submitit, as ``parse_slurm`` gives them.
            parallel: jobs that run at once, on Slurm; here all of them do.
            folder: for what submitit writes.
        """
        executor = _executor(folder, cluster, parameters, parallel)
        local = cluster == "local"
        env = environments(len(jobs)) if local else [None] * len(jobs)
        try:
            submitted = executor.map_array(run_job, jobs, env)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--cluster {cluster}: not submitted: {first_line(error)}") from error
        self._active = [(job.run, handle) for job, handle in zip(jobs, submitted, strict=True)]

    def poll(self) -> list[tuple[CellRun, str | None]]:
        ended, active = [], []
        for run, handle in self._active:
            (ended if handle.done() else active).append((run, handle))
        self._active = active
        return [(run, self._error(run, handle)) for run, handle in ended]

    @staticmethod
    def _error(run: CellRun, handle: Any) -> str | None:
        if handle.exception() is not None:  # Of the job itself: killed, out of time or memory.
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
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline and not all(handle.done() for handle in active):
            time.sleep(0.2)


def _wait_for_summary(run: CellRun) -> None:
    """A network file system may show what a node wrote only after a while."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while run.summary() is None and time.monotonic() < deadline:
        time.sleep(0.5)

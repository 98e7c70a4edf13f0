"""The processes of a run: started here by ``--num-gpus``, by torchrun, or by Slurm's srun."""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing.connection
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from ..errors import UserError
from .config.load import load_config, resolve_device
from .stop import EXIT_STOPPED, STOP_SIGNALS

# So long a process with an error waits for what started it to end it: if another one has met the
# same, or is the cause, that one says so first.
_GRACE_SECONDS = 5
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Where a process stands in its run, and where the processes meet."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    url: str

    def __post_init__(self) -> None:
        even = self.local_size > 0 and self.world_size % self.local_size == 0
        if not even or self.rank % self.local_size != self.local_rank:
            raise UserError(
                f"{self.launcher}: process {self.rank} of {self.world_size} is number "
                f"{self.local_rank} of {self.local_size} on its machine: every machine needs the "
                "same number of processes, numbered machine by machine"
            )


def launch(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run ``main(args)`` in this process, as one of several where torchrun or srun has started it.

    With ``--num-gpus`` or ``--num-machines`` the processes of this machine are started here. A
    process that fails shows its own error and ends the whole run with exit code 1. A signal that
    asks this process to stop is passed on to them.

    Args:
        main: of one process, to be found by its module and name.
        args: of ``detectron2.engine.default_argument_parser``; ``dist_url`` may be "auto".
    """
    place = None
    try:
        place = find_place(os.environ)
        check_flags(args, place)
        if place is None and args.num_gpus * args.num_machines > 1:
            start_processes(main, args)
            return
        several = place is not None and place.world_size > 1
        device = read_device(args, place) if several else None
    except UserError as error:
        end_with(error, place.rank if place else None)
    if several:
        run_in_group(main, args, place, device)
    else:
        main(args)


def find_place(env: Mapping[str, str]) -> Place | None:
    """This process's place according to torchrun or srun; None if neither has started it."""
    if "RANK" in env and "WORLD_SIZE" in env:
        missing = [name for name in _TORCHRUN if name not in env]
        if missing:
            raise UserError(
                f"RANK and WORLD_SIZE are set, as torchrun sets them, but not {missing[0]}: start "
                "with torchrun, or unset them"
            )
        return Place("torchrun", *(int(env[name]) for name in _TORCHRUN[:4]), "env://")
    # Of the step, which srun makes; a batch script has those of the job, but is one process.
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return _slurm_place(env)
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NUM_TASKS" not in env:
        print(
            f"warning: the Slurm job has {env['SLURM_NTASKS']} tasks, but srun has not started "
            "this process, so it is none of them",
            file=sys.stderr,
        )
    return None


def _slurm_place(env: Mapping[str, str]) -> Place:
    # Such as "4(x2)", or "4,3" where machines differ.
    counts = re.sub(r"\(x\d+\)", "", env["SLURM_STEP_TASKS_PER_NODE"]).split(",")
    if len(set(counts)) > 1:
        raise UserError(
            f"srun has {env['SLURM_STEP_TASKS_PER_NODE']} tasks on the machines: set "
            "--ntasks-per-node, every machine needs the same number"
        )
    # One job after another on one machine must not meet; these ports are for such use.
    port = env.get("MASTER_PORT") or 49152 + int(env["SLURM_JOB_ID"]) % 16384
    return Place(
        "srun",
        int(env["SLURM_PROCID"]),
        int(env["SLURM_STEP_NUM_TASKS"]),
        int(env["SLURM_LOCALID"]),
        int(counts[0]),
        f"tcp://{env.get('MASTER_ADDR') or _first_host(env['SLURM_STEP_NODELIST'])}:{port}",
    )


def _first_host(nodes: str) -> str:
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
        return names.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            f"scontrol does not tell the first machine of {nodes}: set MASTER_ADDR to it in the "
            "batch file"
        ) from error


def check_flags(args: argparse.Namespace, place: Place | None) -> None:
    """Refuse flags that make no sense, or that contradict what has started this process."""
    flags = f"--num-gpus={args.num_gpus} --num-machines={args.num_machines}"
    if min(args.num_gpus, args.num_machines) < 1 or not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"{flags} --machine-rank={args.machine_rank}: the numbers must be at least 1, and the "
            "rank from 0 to below the number of machines"
        )
    if place is not None and args.num_gpus * args.num_machines > 1:
        raise UserError(
            f"{place.launcher} has started {place.world_size} processes already, but the flags say "
            f"{flags}: leave them out"
        )
    if place is None and args.num_machines > 1 and args.dist_url == "auto":
        raise UserError(
            f"{flags} needs --dist-url tcp://<address of machine 0>:<free port>, the same on every "
            "machine"
        )


def read_device(args: argparse.Namespace, place: Place | None) -> torch.device:
    """The kind of device that the config names, of which every process must have one.

    Raises:
        UserError: it does not suffice for the processes of this machine, or the config is bad.
    """
    cfg = load_config(args.config_file, args.opts)
    device = torch.device(resolve_device(cfg))
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise UserError(
            f"train.device is {device}, one device for all processes: set it to cuda, and "
            "CUDA_VISIBLE_DEVICES to the devices to use"
        )
    there, wanted = torch.cuda.device_count(), place.local_size if place else args.num_gpus
    # Slurm may show each task its own device alone.
    if there < wanted and not (there == 1 and place is not None and place.launcher == "srun"):
        raise UserError(
            f"{wanted} processes on this machine, but torch sees {there} CUDA devices: start "
            "fewer, or set train.device=cpu"
        )
    return device


def start_processes(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Start the ``--num-gpus`` processes of this machine, and wait for their end."""
    device = read_device(args, None)
    url = args.dist_url
    if url == "auto":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with _passed_on() as (children, signals):
        context = mp.start_processes(
            _child, args=(main, args, url, device), nprocs=args.num_gpus, join=False
        )
        children += context.processes
        for number in signals:  # That came while they were started.
            _send(children, number)
        _wait_for(context, args.machine_rank * args.num_gpus, signals)


def _wait_for(context: mp.ProcessContext, first_rank: int, signals: Sequence[int]) -> None:
    """Wait for the processes; exits unless all of them end well.

    Args:
        signals: those that have been passed on; they may grow.
    """
    processes = context.processes
    cause: mp.Process | None = None
    try:
        while running := [p for p in processes if p.exitcode is None]:
            # Not without end: loader workers hold a dead process's sentinel for some seconds.
            multiprocessing.connection.wait([p.sentinel for p in running], timeout=1)
            failed = [p for p in processes if p.exitcode not in (None, 0, EXIT_STOPPED)]
            if failed and not signals:
                # Before those that have met its end.
                cause = min(failed, key=lambda process: process.exitcode)
                # The others would take join's SIGTERM for a wish to save, which they cannot.
                for process in running:
                    process.kill()
                break
        while not context.join():
            pass
    except mp.ProcessExitedException as error:
        if len(signals) > 1:
            sys.exit(128 + signals[-1])
        cause = cause or processes[error.error_index]
        code = cause.exitcode
        # By the signal itself, if it came before a process listened; then it has done nothing.
        if code == EXIT_STOPPED or -code in signals:
            sys.exit(EXIT_STOPPED)
        # Another that failed has said why.
        if code < 0:
            print(
                f"error: process {first_rank + processes.index(cause)} (pid {cause.pid}) was "
                f"killed by {signal.Signals(-code).name}"
                + (", as the system does when memory is short" * (code == -signal.SIGKILL)),
                file=sys.stderr,
            )
        sys.exit(1)
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        sys.exit(130)


@contextlib.contextmanager
def _passed_on() -> Iterator[tuple[list[mp.Process], list[int]]]:
    """Within the context, the first signal to stop goes to all children, and a second kills them.

    Yields:
        The children, to be filled in, and the signals that have come.
    """
    children: list[mp.Process] = []
    signals: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        signals.append(number)
        _send(children, number if len(signals) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield children, signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(children: Sequence[mp.Process], number: int) -> None:
    for child in children:
        if child.is_alive():
            os.kill(child.pid, number)


def _child(
    local_rank: int,
    main: Callable[[argparse.Namespace], None],
    args: argparse.Namespace,
    url: str,
    device: torch.device,
) -> None:
    size = args.num_gpus
    rank = args.machine_rank * size + local_rank
    place = Place("--num-gpus", rank, size * args.num_machines, local_rank, size, url)
    run_in_group(main, args, place, device)


def run_in_group(
    main: Callable[[argparse.Namespace], None],
    args: argparse.Namespace,
    place: Place,
    device: torch.device,
) -> None:
    """Run ``main(args)`` as one of several processes, nccl on CUDA and gloo elsewhere."""
    try:
        if device.type == "cuda":
            torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=place.url,
            rank=place.rank,
            world_size=place.world_size,
            # Long, because the main process evaluates and writes while the others wait. A dead
            # process is not found by it, but by what has started it, or by its closed connection.
            timeout=DEFAULT_TIMEOUT,
        )
        comm.create_local_process_group(place.local_size)
        comm.synchronize()
        main(args)
        # The main process may be where the others meet: it leaves last.
        comm.synchronize()
        dist.destroy_process_group()
    except Exception as error:
        end_with(error, place.rank)


def has_lost_another(error: Exception) -> bool:
    """Whether an error is that another process of the run has gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def end_with(error: Exception, rank: int | None = None) -> NoReturn:
    """End this process with exit code 1, having shown its error: a UserError in one line.

    Args:
        rank: of this process; None if it is the only one.
    """
    lost = has_lost_another(error)
    if rank is not None and (rank > 0 or lost):
        time.sleep(_GRACE_SECONDS)
    get_error_handler().record_exception(error)  # For torchrun's own report.
    if isinstance(error, UserError):
        who = f"process {rank}: " if rank else ""
        print(f"error: {who}{error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    if lost:
        print(
            f"error: process {rank} has lost another one: what ended first shows why",
            file=sys.stderr,
        )
    if rank is None:
        sys.exit(1)
    # Not sys.exit: with a process missing, leaving the group in good order could wait for it.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)

"""Starting the processes of a run on this machine, and watching them to their end."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing.connection
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from ..errors import UserError
from .distributed import Place, check_flags, find_place, joined_group, read_device
from .stop import EXIT_STOPPED, STOP_SIGNALS, end_process, handled

# How long a process that fails waits to be ended by what started it: another one may have met the
# same error, or be its cause, and should say so first.
_GRACE_SECONDS = 5


def launch(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run ``main(args)`` in this process, as one of several where torchrun or srun has started it.

    With ``--num-gpus`` or ``--num-machines`` the processes of this machine are started here. A
    process that fails shows its own error and ends the whole run with exit code 1. A signal that
    asks this process to stop is passed on to them.

    Args:
        main: of one process, to be found by its module and name.
        args: of ``engine.arguments.argument_parser``; ``dist_url`` may be "auto".
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
            # With a timeout: loader workers hold a dead process's sentinel for some seconds.
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
        # A signal that came before a process listened has ended it; it had done nothing yet.
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

    with handled(STOP_SIGNALS, pass_on):
        yield children, signals


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
    """Run ``main(args)`` as one of several processes."""
    try:
        with joined_group(place, device):
            main(args)
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
    # sys.exit would not do: leaving the group in good order could wait for a missing process.
    end_process(1)

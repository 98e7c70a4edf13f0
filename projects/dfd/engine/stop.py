"""A run that a signal asks to end: it saves what it has done, and can go on from there."""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.utils.data import DataLoader

# EX_TEMPFAIL of sysexits.h: not done, to be tried again.
EXIT_STOPPED = 75
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# A launcher passes on what the system may have sent to its processes too: that is one request.
_ONE_REQUEST_SECONDS = 0.5
_ONE_REQUEST_SECONDS_OF_SEVERAL = 2.0


class Stopped(BaseException):
    """The run ends by request. No error, so nothing that catches errors takes it for one."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def handled(numbers: Iterable[int], handler: Any) -> Iterator[None]:
    """Within the context, signals go to a handler. Not in a thread, which cannot have them.

    An ignored signal (nohup, SIGHUP) stays so: what started the process does not want it heard.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in numbers}
    before = {n: earlier for n, earlier in before.items() if earlier is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            # None: it was not set by Python, which cannot set it again.
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


class StopRequest:
    """Whether this process, or another one of the run, has been told to end.

    While training makes steps, a signal is only noted: the run ends after the step. Before and
    after that, when nothing new is to be saved, it ends at once with :class:`Stopped`.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._in_steps = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within the context, signals come here. Not in a thread, which cannot have them."""
        with handled(STOP_SIGNALS, self._note):
            yield

    def _note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.number:
            several = comm.get_world_size() > 1
            window = _ONE_REQUEST_SECONDS_OF_SEVERAL if several else _ONE_REQUEST_SECONDS
            if now - self._since > window:
                end_process(128 + number)
            return
        self.number, self._since = number, now
        if not self._in_steps:
            raise Stopped(number)

    def begin_steps(self) -> None:
        """From now on, signals wait for the end of a step."""
        self._in_steps = True

    def end_steps(self) -> None:
        """All is saved: from now on, signals do not wait."""
        self._in_steps = False
        if self.number:
            raise Stopped(self.number)

    def anywhere(self) -> int:
        """The signal that any process of the run has got, 0 if none; to be called in all of them.

        So all of them end after the same step. A message of one number between several processes.
        """
        if comm.get_world_size() == 1:
            return self.number
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        number = torch.tensor(self.number, device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)


def end_process(code: int) -> NoReturn:
    """End this process and its loaders at once, without waiting for other processes or threads."""
    for child in multiprocessing.active_children():
        child.kill()
    logging.shutdown()
    # What they are written to may be gone.
    with contextlib.suppress(OSError, RuntimeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def guard_workers(loader: Any) -> Any:
    """Let a loader's worker processes go on when a stop signal reaches them too.

    A cluster, and a terminal, send it to every process of a run; the step that is being made still
    needs the workers.

    Args:
        loader: one of torch's, or one around it; anything else is left as it is.
    """
    for part in ("labelled", "unlabelled"):  # Of a loader of both.
        if hasattr(loader, part):
            guard_workers(getattr(loader, part))
    inner = loader
    while inner is not None and not isinstance(inner, DataLoader):
        inner = getattr(inner, "dataset", None)
    if inner is not None and inner.num_workers > 0:
        inner.worker_init_fn = functools.partial(_begin_worker, inner.worker_init_fn)
    return loader


def _begin_worker(begin: Callable[[int], None] | None, worker: int) -> None:
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    # A worker's own process ends it by SIGTERM, which must go on to work. Who sends a signal can
    # only be told (and not everywhere) where it is waited for.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, daemon=True).start()
    if begin is not None:
        begin(worker)


def _end_by_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)

"""What the tools that run trainings share: output, children, and being stopped."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from ..errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# So long a child may take to end by itself: a training makes its step to the end, and saves it.
_PATIENCE_SECONDS = 300.0
_UPDATE_EVERY = 1.0


class Interrupted(BaseException):
    """A signal asked to stop; the message is its name.

    No error, so nothing that catches errors takes it for one.
    """


_hurried = threading.Event()


def stop_on_signals() -> None:
    """From now on, the first signal that asks to stop raises :class:`Interrupted`.

    A second one makes ``end`` wait no longer. Signals that are ignored stay so.
    """
    _hurried.clear()
    _handle_signals(_interrupt)


def _handle_signals(handler: Callable[[int, Any], None]) -> None:
    for number in SIGNALS:
        # What started this does not want it to hear an ignored signal (nohup, SIGHUP).
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> None:
    # Once is enough: a second one would disturb the ending of the children.
    _handle_signals(lambda *_: _hurried.set())
    raise Interrupted(signal.Signals(number).name)


@contextlib.contextmanager
def ending_in_one_line(note: str = "") -> Iterator[None]:
    """Within the context, a user's error and a signal end the process with a line that says so.

    With exit code 1, and 130 for a signal.

    Args:
        note: goes after the name of the signal.
    """
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except Interrupted as error:
        # After SIGHUP there is no terminal any more.
        with contextlib.suppress(OSError):
            print(f"\nstopped by {error}{note}", file=sys.stderr)
        sys.exit(130)


def say(text: str = "") -> None:
    # The name of a file may be no text, or have letters that the terminal's encoding lacks.
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


class LiveLine:
    """The state of what runs: one line that is redrawn on a terminal, else a new line on news."""

    def __init__(self, *, line_every: float) -> None:
        """
        Args:
            line_every: seconds between two lines, at the least, where the output is no terminal.
        """
        self._terminal = sys.stdout.isatty()
        self._interval = _UPDATE_EVERY if self._terminal else line_every
        self._start = time.monotonic()
        self._shown = -float("inf")
        self._state = ""
        self.elapsed = 0.0

    def update(self, state: str) -> None:
        """Show a state if it is time to."""
        self.elapsed = time.monotonic() - self._start
        if self.elapsed - self._shown < self._interval:
            return
        if state == self._state and not self._terminal:
            return
        self._shown, self._state = self.elapsed, state
        text = f"      {duration(self.elapsed)}: {state}"
        if self._terminal:
            # The line must not wrap, or a carriage return would not reach its beginning.
            text = text[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[K{text}", end="", flush=True)
        else:
            say(text)

    def clear(self) -> None:
        if self._terminal:
            # After SIGHUP there is no terminal any more.
            with contextlib.suppress(OSError):
                print("\r\x1b[K", end="", flush=True)


def start(
    command: Sequence[str],
    *,
    output: int | IO[Any] = subprocess.PIPE,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen:
    """Start a child in a process group of its own, so that all of it can be ended.

    Args:
        output: where what it prints goes; a pipe is read as text.
        env: its environment; None: this process's.
    """
    return subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        # Or a line on stderr could come before one that was printed earlier.
        env={**(os.environ if env is None else env), "PYTHONUNBUFFERED": "1"},
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def end(*processes: subprocess.Popen) -> None:
    """End children and their children: all are asked to, and after a long while each is made to.

    A training that is asked to saves what it has done. A second signal of ``stop_on_signals`` ends
    the wait.
    """
    for number, seconds in ((signal.SIGTERM, _PATIENCE_SECONDS), (signal.SIGKILL, 10.0)):
        processes = tuple(process for process in processes if process.poll() is None)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        deadline = time.monotonic() + seconds
        for process in processes:
            while process.poll() is None and time.monotonic() < deadline:
                if _hurried.is_set() and number == signal.SIGTERM:
                    break
                time.sleep(0.02)

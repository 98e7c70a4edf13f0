"""How far an ablation is, and when it will have ended."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from ...engine.console import duration
from ...engine.run_folder import training_length
from .folders import CellRun, tail


class Progress:
    """Counts runs, and the parts of those that run, to say how long the rest will take."""

    def __init__(self, *, total: int, done: int) -> None:
        """
        Args:
            done: runs that were done before and are not run again.
        """
        self._total = total
        self._skipped = done
        self._done = 0
        self._failed = 0
        self._left = 0
        # How much was done of a run when it went on from an earlier attempt, by its name.
        self._begun: dict[str, float] = {}
        self._start = time.monotonic()

    def add(self, *, failed: bool) -> None:
        """Count a run that ended."""
        self._failed += failed
        self._done += not failed

    def leave(self) -> None:
        """Count a run that ended, but is neither done nor failed."""
        self._left += 1

    def text(self, running: Sequence[CellRun]) -> str:
        """The state in one line."""
        done = self._skipped + self._done
        parts = [f"{done} of {self._total} runs done", f"{len(running)} running"]
        parts += [f"{self._failed} failed"] if self._failed else []
        shares = {run.name: share_done(run) for run in running}
        for name, share in shares.items():
            self._begun.setdefault(name, share)
        left = self.seconds_left(sum(shares.values()), sum(self._begun.values()))
        parts.append("time left not known yet" if left is None else f"about {duration(left)} left")
        return ", ".join(parts)

    def seconds_left(self, running: float, before: float = 0.0) -> float | None:
        """An estimate at the pace so far; None: there is no pace yet.

        Args:
            running: how much is done of the runs that run, in runs.
            before: how much of all that had been done when they were started, which took no time.
        """
        # A run that failed took no usual time: it is neither pace nor work that is left.
        done = self._done + running
        made = done - before
        left = self._total - self._skipped - self._failed - self._left - done
        return (time.monotonic() - self._start) * left / made if made > 1e-6 else None


def share_done(run: CellRun) -> float:
    """How much of a run is done, from 0 to 1, by the iterations that it has logged."""
    length = training_length(run.folder)
    if not length:
        return 0.0
    for line in reversed(tail(run.folder / "metrics.json")):
        try:
            return min(1.0, (json.loads(line)["iteration"] + 1) / length)
        except (ValueError, KeyError, TypeError):  # Not written to its end yet.
            continue
    return 0.0

"""Runs that are killed or told to stop at a moment, and whether two runs have come to the same."""

import contextlib
import os
import signal
import sys

import pytest
import torch
from commands import load_tool

from dfd.engine.trainer import Trainer

kill_resume = load_tool("kill_resume")


class Killed(BaseException):
    """In place of SIGKILL, which would end the tests too."""


def at_iteration(number):
    """Whether a trainer is in this iteration."""
    return lambda trainer, *_: trainer.iter == number


@contextlib.contextmanager
def interrupted(how, owner, name, when=lambda *_, **__: True, call=1):
    """Within the context, interrupt a run where it calls a function.

    Args:
        how: an exception to raise, or a signal for this process, after which the run goes on.
        when: whether a call with these arguments counts.
        call: the number of the call, of those that count.

    Yields:
        What ``pytest.raises`` knows of the end, which has to come.
    """
    function, calls = getattr(owner, name), []
    told = isinstance(how, signal.Signals)

    def interrupting(*args, **kwargs):
        if when(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                if not told:
                    raise how
                os.kill(os.getpid(), how)
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit if told else how) as end:
        patch.setattr(owner, name, interrupting)
        without_an_end(patch)
        yield end


def without_an_end(patch):
    """A killed run does nothing more, where one that fails ends its writers."""
    after_train = Trainer.after_train

    def ended(trainer):
        if not isinstance(sys.exc_info()[1], Killed):
            after_train(trainer)

    patch.setattr(Trainer, "after_train", ended)


def names(folder):
    """Of its checkpoints, without "model_" and leading zeros: the iteration, best, ema, final."""
    stems = (path.stem.removeprefix("model_") for path in folder.glob("*.pth"))
    return " ".join(sorted(stem.lstrip("0") or "0" for stem in stems))


def assert_same(folder, straight, *, settings=True):
    """Equal to the bit: the last checkpoint, the best, the EMA, and what was logged.

    Args:
        settings: whether those in the checkpoint are held against each other too.
    """
    states = []
    for path in (straight, folder):
        state = kill_resume.state(path)
        exports = [path / f"model_{name}.pth" for name in ("best", "ema")]
        for export in filter(os.path.exists, exports):
            state[export.stem] = torch.load(export, weights_only=True)
        for part in () if settings else (key for key in state if key != "metrics"):
            state[part].pop("settings", None)
        states.append(state)
    assert kill_resume.differences(*states, "run") == []

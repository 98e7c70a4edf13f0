"""What is shared by the tools that run trainings: being stopped, and what is printed."""

import os
import signal

import pytest

from dfd.engine import console
from dfd.engine.console import SIGNALS, Interrupted, say, stop_on_signals


@pytest.fixture
def handlers():
    """The signals' own handlers, and what was there after the test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    console._hurried.clear()


def test_a_signal_that_is_ignored_stays_so(handlers):
    """As nohup starts a command that is to outlive its terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop_on_signals()
    os.kill(os.getpid(), signal.SIGHUP)
    with pytest.raises(Interrupted, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGHUP)
    assert not console._hurried.is_set()
    os.kill(os.getpid(), signal.SIGTERM)
    assert console._hurried.is_set()


def test_a_name_that_is_no_text_is_printed(capsys):
    say(os.fsdecode(b"caf\xe9.png"))
    assert capsys.readouterr().out == "caf\\udce9.png\n"

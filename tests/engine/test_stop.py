"""What a signal does to the process and to its loaders."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.data import DataLoader

from dfd.engine import stop as stop_module
from dfd.engine.stop import STOP_SIGNALS, Stopped, StopRequest, guard_workers

pytestmark = pytest.mark.slow


def test_second_signal_ends_the_process_at_once(monkeypatch):
    """But not the first one again, which a launcher passes on beside the system."""
    codes, now = [], [0.0]
    monkeypatch.setattr(stop_module, "end_process", codes.append)
    monkeypatch.setattr(stop_module.time, "monotonic", lambda: now[0])
    stop = StopRequest()
    with stop.listening():
        stop.begin_steps()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.anywhere() == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        assert codes == []
        now[0] = 1.0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert codes == [128 + signal.SIGUSR1]
        with pytest.raises(Stopped, match="SIGTERM"):
            stop.end_steps()


def test_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with StopRequest().listening():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def begin(worker):
    torch.manual_seed(100 + worker)


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return index, os.getpid(), torch.initial_seed()


@pytest.mark.parametrize("wrapped", [False, True])
def test_loader_goes_on_when_its_workers_are_told_to_stop_too(wrapped):
    class Around:
        def __init__(self, dataset):
            self.dataset = dataset

    loader = DataLoader(Numbers(), num_workers=1, worker_init_fn=begin, batch_size=None)
    guard_workers(Around(loader) if wrapped else loader)
    items = iter(loader)
    first, pid, seed = next(items)
    assert (first, seed) == (0, 100)  # What the loader's own function did is still done.
    for number in STOP_SIGNALS:
        # By another process than its own, which alone may end it.
        subprocess.run([sys.executable, "-c", f"import os; os.kill({pid}, {int(number)})"])
    time.sleep(0.2)
    assert [item[0] for item in items] == list(range(1, 40))
    (worker,) = DataLoader.__iter__(loader)._workers
    worker.terminate()
    worker.join(20)
    assert worker.exitcode is not None

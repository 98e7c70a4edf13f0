"""A run that is told to stop saves what it has done, and goes on from there to the same end."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import ENV, free_port, load_tool, run
from forked import forked
from plain import write_rectangles
from torch.utils.data import DataLoader

import dfd
from dfd.engine import stop as stop_module
from dfd.engine.hooks import RunSummary
from dfd.engine.stop import EXIT_STOPPED, STOP_SIGNALS, Stopped, StopRequest, guard_workers
from dfd.engine.trainer import Trainer

pytestmark = pytest.mark.slow

kill_resume = load_tool("kill_resume")
SETTINGS = [
    "train.max_iter=6",
    "train.log_period=4",
    "train.checkpointer.period=4",
    "train.accumulation_steps=2",
    "train.eval_period=3",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rectangles")
    train = [f"dataloader.train.{o}" for o in write_rectangles(folder, "train", 8, seed=0)]
    return train + [f"dataloader.test.{o}" for o in write_rectangles(folder, "val", 3, seed=1)]


@pytest.fixture
def start(data, configs):
    def call(folder, *flags):
        run(configs["plain"], *flags, *data, *SETTINGS, f"train.output_dir={folder}")

    return call


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data, configs):
    """The run that is never told to."""
    folder = tmp_path_factory.mktemp("straight")
    run(configs["plain"], *data, *SETTINGS, f"train.output_dir={folder}")
    return folder


def tell_in(patch, owner, name, number, when=lambda *_: True):
    """Send this process a signal, once, when it calls a function with such arguments."""
    function, left = getattr(owner, name), [1]

    def telling(*args, **kwargs):
        if when(*args) and left:
            left.pop()
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    patch.setattr(owner, name, telling)


def names(folder):
    return sorted(path.name for path in folder.glob("model_*.pth"))


def assert_same(folder, straight):
    states = [kill_resume.state(path) for path in (straight, folder)]
    for (
        state
    ) in states:  # The evaluator's folder is one, and the mapper that tells the run to stop.
        del state["checkpoint"]["settings"]
    assert kill_resume.differences(*states, "run") == []


# The second half of a step's batch, the last step, a step after which a checkpoint is due anyway,
# and what follows the last step.
MOMENTS = {
    "in an accumulated step": (Trainer, "_losses", lambda t, _: t.iter == 1, ["model_0000001.pth"]),
    "in the last step": (
        Trainer,
        "run_step",
        lambda t: t.iter == 5,
        ["model_0000003.pth", "model_final.pth"],
    ),
    "before a checkpoint": (Trainer, "run_step", lambda t: t.iter == 3, ["model_0000003.pth"]),
    "after training": (
        RunSummary,
        "after_train",
        lambda _: True,
        ["model_0000003.pth", "model_final.pth"],
    ),
    "before training": (Trainer, "train", lambda *_: True, []),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_run_that_is_told_to_stop_goes_on_to_the_same_end(straight, start, tmp_path, moment):
    *where, when, saved = MOMENTS[moment]
    number = STOP_SIGNALS[len(moment) % 2]
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        tell_in(patch, *where, number, when)
        start(tmp_path)
    assert end.value.code == EXIT_STOPPED == 75
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert names(tmp_path) == saved
    assert not (tmp_path / "summary.json").exists()
    start(tmp_path, "--resume")
    assert_same(tmp_path, straight)
    assert json.loads((tmp_path / "summary.json").read_text())["iterations"] == 6


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


@pytest.mark.parametrize("name", ["engine/console", "engine/stop", "engine/machine"])
def test_system_without_these_signals_and_resource_is_no_error(name, monkeypatch):
    """As Windows is."""
    for missing in ("SIGUSR1", "SIGHUP"):
        monkeypatch.delattr(signal, missing)
    monkeypatch.setitem(sys.modules, "resource", None)
    path = Path(dfd.__file__).parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location("elsewhere", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if name == "engine/machine":
        monkeypatch.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(OSError()))
        assert module.peak_memory_mib() == 0
    else:
        of_console = name == "engine/console"
        assert signal.SIGTERM in (module.SIGNALS if of_console else module.STOP_SIGNALS)


def torchrun(config, *arguments):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    train = [f"--master_port={free_port()}", "train_net.py", "--config-file", config]
    return subprocess.run(
        [sys.executable, *launcher, *train, *arguments],
        capture_output=True,
        text=True,
        env=ENV,
        start_new_session=True,  # Or the tests would be told to stop too.
    )


STOP = ["+dataloader.train.mapper.how=stop", "+dataloader.train.mapper.at=9"]


def test_all_processes_stop_after_one_step_and_go_on_together(data, configs, tmp_path):
    settings = ["--num-gpus=2", *data, "train.max_iter=8", "train.checkpointer.period=100"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    result = forked(configs["plain"], *settings, *STOP, f"train.output_dir={stopped}")
    assert result.returncode == EXIT_STOPPED, result.stderr[-3000:]
    assert "error" not in result.stderr and "Traceback" not in result.stderr
    (name,) = names(stopped)
    assert 0 < torch.load(stopped / name, weights_only=True)["iteration"] < 7
    ends = [
        forked(configs["plain"], *settings, f"train.output_dir={straight}"),
        forked(configs["plain"], "--resume", *settings, f"train.output_dir={stopped}"),
    ]
    assert [end.returncode for end in ends] == [0, 0], ends[1].stderr[-3000:]
    assert_same(stopped, straight)


def test_processes_and_loaders_of_torchrun_stop_too(data, configs, tmp_path):
    settings = ["train.max_iter=8", "train.checkpointer.period=100"]
    settings += ["dataloader.train.num_workers=1", f"train.output_dir={tmp_path}"]
    result = torchrun(configs["plain"], *data, *settings, *STOP)
    assert "stopped by SIGTERM" in result.stderr, result.stderr[-3000:]
    assert len(names(tmp_path)) == 1

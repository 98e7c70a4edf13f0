"""What each process of a resumed run goes on with: random numbers, data, buffers."""

import random

import numpy as np
import torch
from detectron2.utils import comm
from torch.multiprocessing import start_processes

from dfd.engine.evaluation import share_buffers
from dfd.engine.run import continue_streams
from dfd.engine.state.random_state import random_state


def test_each_process_has_its_own_random_numbers_back(monkeypatch, caplog):
    states = []
    for seed in (0, 1):
        for generator in (torch.manual_seed, np.random.seed, random.seed):
            generator(seed)
        # numpy and random draw normal numbers in pairs and keep the second.
        draw()
        states.append(random_state())
    expected = draw()
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    draw()
    continue_streams([], 0, states)
    assert draw() == expected
    assert "processes" not in caplog.text

    monkeypatch.setattr(comm, "get_world_size", lambda: 4)
    continue_streams([], 0, states)
    assert "4 processes instead of 2: the run goes on, but not as it would have" in caplog.text


def draw():
    return torch.randn(1).item(), np.random.randn(), random.gauss(0, 1)


def test_loader_of_another_project_is_said_to_begin_anew(caplog):
    continue_streams([], 3, [random_state()])
    assert "the training loader is not this project's: its data start anew" in caplog.text


def test_every_process_evaluates_what_the_checkpoint_holds(tmp_path):
    """The main process's batch norms, not each its own, which a resumed run would not have."""
    start_processes(evaluate_in_process, (str(tmp_path),), nprocs=2, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2)]
    assert found == [[1.0, 1.0], [1.0, 1.0]]


def evaluate_in_process(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    norm = torch.nn.BatchNorm2d(2)
    norm.running_mean.fill_(rank + 1)
    share_buffers(norm)
    torch.save(norm.running_mean.tolist(), f"{folder}/{rank}.pth")

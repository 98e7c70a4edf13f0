"""Several processes: what they share, trained and evaluated as in one, told to stop, dying."""

import json
import os
import random
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
from commands import free_port, run
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from forked import SERVER, forked
from interrupted import assert_same, names
from launchers import slurm, torchrun
from own_toys import build
from plain import write_rectangles
from torch import nn
from torch.multiprocessing import start_processes
from toys import make_batch

from dfd.distill.disparity import scale_features
from dfd.distill.processes import own_divisors, share_buffers, share_divisors
from dfd.engine.checks import check_same_start
from dfd.engine.launch import _wait_for
from dfd.engine.run import continue_streams
from dfd.engine.state.random_state import random_state
from dfd.engine.stop import EXIT_STOPPED, StopRequest
from dfd.errors import UserError
from dfd.losses import DFDLoss, PKDLoss

pytestmark = pytest.mark.slow

# Each process's images of the whole batch.
IMAGES = {0: slice(0, 1), 1: slice(1, 3)}


def features(images=slice(None), all_valid=False):
    """Student and teacher of three images far from zero mean, and their valid cells."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 6, 8, generator=generator) * 3 + 50
    valid = torch.rand(3, 6, 8, generator=generator) > 0.3
    valid[0] = True  # The first process says None.
    valid = None if all_valid else valid[images]
    return student[images].requires_grad_(), teacher[images], valid


def part_of_statistics(rank, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {}
    for scale in ("channel", "level"):
        student, teacher, valid = features(IMAGES[rank], rank == 0)
        found[scale] = scale_features(student, teacher, valid, scale, sync=True)
    # Two images each for what only equal counts make equal.
    for name, criterion in CRITERIA.items():
        student, teacher = even_features(slice(2 * rank, 2 * rank + 2))
        loss = criterion(student, teacher)
        loss.backward()
        found[name] = loss.detach(), student.grad
    student, teacher, _ = features(IMAGES[rank])
    found["none valid"] = scale_features(
        student, teacher, torch.full((len(student), 6, 8), rank == 0), "channel", sync=True
    )
    weights = nn.Linear(2, 2)
    nn.init.ones_(weights.weight)
    nn.init.zeros_(weights.bias)
    found["starts"] = [start_of(weights, 3), start_of(weights, 3 * rank)]
    weights.bias.data += rank
    found["starts"].append(start_of(weights, 0))
    stop = StopRequest()
    found["stop"] = [stop.anywhere()]
    stop.number = 15 * rank  # One of them alone is told to.
    found["stop"].append(stop.anywhere())
    for kind in DENSE:
        found[kind] = steps_of_dense(kind, slice(rank, rank + 1))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # On a busy machine a thread of torch's may outlive the interpreter, which aborts the process.
    os._exit(0)


def start_of(model, iteration):
    """What ``check_same_start`` says."""
    try:
        check_same_start(model, iteration)
        return ""
    except UserError as error:
        return str(error)


def even_features(images=slice(None)):
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 4, 4, 6, 8, generator=generator) + 5
    return student[images].requires_grad_(), teacher[images]


def steps_of_dense(kind, images):
    """Losses, gradients and running mean of a dense detector after each of three steps."""
    model, found = build(kind).train(), []
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # It would look beyond an image.
    share_divisors(model)
    for seed in range(3):
        model.zero_grad()
        batch = make_batch(((64, 96), (64, 96)), seed=seed)
        batch[0]["instances"] = batch[0]["instances"][:1]
        with EventStorage():
            losses = model(batch[images])
        sum(losses.values()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        gradient = torch.cat([g.flatten() for g in gradients])
        mean = getattr(model, "loss_normalizer", 0)  # RepPoints and YOLOX keep none.
        found.append((mean, sum(losses.values()).detach(), gradient))
    return found


DENSE = ("retinanet", "fcos", "reppoints", "yolox")
CRITERIA = {
    "dfd": DFDLoss(sync_statistics=True, split="quantile"),
    "dfd all": DFDLoss(sync_statistics=True, average="all", scale="level"),
    "pkd": PKDLoss(sync_statistics=True),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    arguments = free_port(), str(folder)
    start_processes(part_of_statistics, arguments, nprocs=2, start_method=SERVER.get_start_method())
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("scale", ["channel", "level"])
def test_synchronised_statistics_are_those_of_the_whole_batch(parts, scale):
    """With one and two images, and with cells of padding in one process alone."""
    student, teacher, valid = features()
    expected = scale_features(student, teacher, valid, scale)
    for rank, images in IMAGES.items():
        for ours, whole in zip(parts[rank][scale], expected, strict=True):
            torch.testing.assert_close(ours, whole[images], rtol=1e-4, atol=1e-4)


def test_process_without_a_valid_cell_takes_the_statistics_of_the_others(parts):
    student, teacher, _ = features(IMAGES[0])
    expected = scale_features(student, teacher, None, "channel")
    for ours, whole in zip(parts[0]["none valid"], expected, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CRITERIA)
def test_synchronised_losses_average_to_that_of_the_whole_batch(parts, name):
    student, teacher = even_features()
    loss = CRITERIA[name](student, teacher)
    loss.backward()
    torch.testing.assert_close((parts[0][name][0] + parts[1][name][0]) / 2, loss.detach())
    # DistributedDataParallel averages the gradients of the weights, which sum over images.
    gradient = torch.cat([part[name][1] for part in parts]) / 2
    torch.testing.assert_close(gradient, student.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", DENSE)
def test_dense_detector_divides_by_the_positives_of_the_whole_batch(parts, kind):
    """So two processes make a step as one with both images does, and go on from the same mean."""
    for whole, *ours in zip(steps_of_dense(kind, slice(2)), *(p[kind] for p in parts), strict=True):
        assert ours[0][0] == ours[1][0] == pytest.approx(whole[0])
        # As DistributedDataParallel, and the log, average.
        for a, b, expected in zip(*(part[1:] for part in ours), whole[1:], strict=True):
            torch.testing.assert_close((a + b) / 2, expected, rtol=1e-4, atol=1e-6)


def test_all_processes_know_that_one_was_told_to_stop(parts):
    assert [part["stop"] for part in parts] == [[0, 15], [0, 15]]


def test_processes_that_start_differently_are_refused(parts):
    """As where a machine does not see the folder of the run, or has other files."""
    for part in parts:
        same, checkpoints, weights = part["starts"]
        assert same == ""
        assert "different iterations ([0, 3])" in checkpoints
        assert "start from different weights" in weights


def test_a_number_called_divisor_is_no_detectors_divisor(monkeypatch):
    monkeypatch.setattr("dfd.distill.processes.comm.get_world_size", lambda: 2)
    layer = torch.nn.Identity()
    layer.divisor = 2
    share_divisors(layer)
    own_divisors(layer)
    assert layer.divisor == 2


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


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight images to train on, five, which two processes cannot share evenly, to test on."""
    folder = tmp_path_factory.mktemp("rectangles")
    train = [f"dataloader.train.{o}" for o in write_rectangles(folder, "train", 8, seed=0)]
    return train + [f"dataloader.test.{o}" for o in write_rectangles(folder, "val", 5, seed=1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data, configs):
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    run(configs["plain"], *data, f"train.output_dir={folder}")
    return folder


def metrics(folder):
    return [json.loads(line) for line in open(folder / "metrics.json")]


def test_two_processes_make_of_half_the_batch_what_one_makes_of_the_whole(
    whole, data, configs, tmp_path
):
    result = torchrun(configs["plain"], *data, f"train.output_dir={tmp_path}")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "find_unused_parameters" not in result.stderr
    ours, expected = metrics(tmp_path), metrics(whole)
    assert len(ours) == len(expected) == 5  # The last has the AP alone.
    for a, b in zip(ours[:4], expected[:4], strict=True):
        for name in ("total_loss", "loss_cls", "loss_dfd_p3", "loss_dfd_p4"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    assert 0 < expected[-1]["bbox/AP"] < 100
    assert ours[-1]["bbox/AP"] == pytest.approx(expected[-1]["bbox/AP"])
    ours, expected = (
        torch.load(folder / "model_final.pth", weights_only=True) for folder in (tmp_path, whole)
    )
    for part in ("model", "head"):
        assert ours[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            torch.testing.assert_close(ours[part][name], value, rtol=1e-4, atol=1e-5)
    # Both write a log, as with Detectron2; the rest is the first one's.
    first = {name for name in os.listdir(whole) if not name.startswith("events")}
    both = {name for name in os.listdir(tmp_path) if not name.startswith("events")}
    assert both == first | {"log.txt.rank1"}


def test_srun_evaluates_every_image_once_and_as_one_process_does(whole, data, configs, tmp_path):
    port = free_port()
    flags = ["--eval-only", *data, f"train.init_checkpoint={whole}/model_final.pth"]
    arguments = [configs["plain"], *flags, f"train.output_dir={tmp_path}"]
    with ThreadPoolExecutor(2) as pool:
        tasks = list(pool.map(lambda i: forked(*arguments, env=slurm(i, port)), range(2)))
    assert [task.returncode for task in tasks] == [0, 0], tasks[0].stderr[-3000:]
    assert f"copypaste: {metrics(whole)[-1]['bbox/AP']:.4f}" in tasks[0].stdout
    found, expected = (
        json.loads((folder / "coco_instances_results.json").read_text())
        for folder in (tmp_path, whole)
    )
    assert len(found) == len(expected) == 15
    for a, b in zip(*(sorted(x, key=place_of) for x in (found, expected)), strict=True):
        assert place_of(a) == place_of(b)
        assert a["score"] == pytest.approx(b["score"], rel=1e-5)


def place_of(detection):
    return detection["image_id"], detection["category_id"], detection["bbox"]


def test_evaluation_in_training_is_of_the_weights_that_are_saved(data, configs, tmp_path):
    """Batch norms of two processes have seen different images."""
    result = forked(
        configs["plain"],
        "--num-gpus=2",
        *data,
        "model.student.norm=True",
        "optimizer.lr=1e-2",
        f"train.output_dir={tmp_path}",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    predictions = (tmp_path / "coco_instances_results.json").read_text()
    run(
        configs["plain"],
        "--eval-only",
        *data,
        "model.student.norm=True",
        f"train.init_checkpoint={tmp_path}/model_final.pth",
        f"train.output_dir={tmp_path / 'again'}",
    )
    again = (tmp_path / "again" / "coco_instances_results.json").read_text()
    pairs = (sorted(json.loads(text), key=place_of) for text in (predictions, again))
    for a, b in zip(*pairs, strict=True):
        assert a["score"] == pytest.approx(b["score"], rel=1e-4)


def seconds_since_failure(result):
    (failed,) = re.findall(r"failing at ([\d.]+)", result.stdout)
    return time.time() - float(failed)


def test_killed_process_ends_the_run_and_is_named(data, configs, tmp_path):
    result = forked(
        configs["plain"],
        "--num-gpus=2",
        *data,
        "+dataloader.train.mapper.how=kill",
        f"train.output_dir={tmp_path}",
    )
    assert seconds_since_failure(result) < 60
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "process 1 (pid " in errors[0] and "was killed by SIGKILL" in errors[0]
    assert "Traceback" not in result.stderr


def one_dies_and_the_other_notices(rank):
    """The loader worker of the one that is killed outlives it, and holds what tells of its end."""
    if rank == 0:
        time.sleep(3)
        os._exit(1)
    if os.fork() == 0:
        time.sleep(4)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_process_that_died_first_is_named_though_its_workers_live_on(capfd):
    context = torch.multiprocessing.start_processes(
        one_dies_and_the_other_notices, nprocs=2, join=False, start_method="fork"
    )
    with pytest.raises(SystemExit) as end:
        _wait_for(context, 2, [])
    assert end.value.code == 1
    said = capfd.readouterr().err
    assert said.startswith("error: process 3 (pid ") and "was killed by SIGKILL" in said


def test_error_of_one_process_ends_the_run_and_is_shown(data, configs, tmp_path):
    settings = [*data, "+dataloader.train.mapper.how=user", f"train.output_dir={tmp_path}"]
    result = torchrun(configs["plain"], *settings)
    assert seconds_since_failure(result) < 60
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: process 1: this one image is bad"]


STOP = ["+dataloader.train.mapper.how=stop", "+dataloader.train.mapper.at=9"]


def test_all_processes_stop_after_one_step_and_go_on_together(data, configs, tmp_path):
    settings = ["--num-gpus=2", *data, "train.max_iter=8", "train.checkpointer.period=100"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    result = forked(configs["plain"], *settings, *STOP, f"train.output_dir={stopped}")
    assert result.returncode == EXIT_STOPPED, result.stderr[-3000:]
    assert "error" not in result.stderr and "Traceback" not in result.stderr
    assert 0 < int(names(stopped)) < 7
    ends = [
        forked(configs["plain"], *settings, f"train.output_dir={straight}"),
        forked(configs["plain"], "--resume", *settings, f"train.output_dir={stopped}"),
    ]
    assert [end.returncode for end in ends] == [0, 0], ends[1].stderr[-3000:]
    assert_same(stopped, straight, settings=False)


def test_processes_and_loaders_of_torchrun_stop_too(data, configs, tmp_path):
    settings = ["train.max_iter=8", "train.checkpointer.period=100"]
    settings += ["dataloader.train.num_workers=1", f"train.output_dir={tmp_path}"]
    result = torchrun(configs["plain"], *data, *settings, *STOP)
    assert "stopped by SIGTERM" in result.stderr, result.stderr[-3000:]
    assert len(names(tmp_path).split()) == 1


def test_early_stop_ends_all_processes(data, configs, tmp_path):
    result = forked(
        configs["student"],
        "--num-gpus=2",
        *data,
        f"train.output_dir={tmp_path}",
        "optimizer.lr=0",
        "train.max_iter=9",
        "train.eval_period=1",
        "train.ema.decay=0.5",
        "train.val_loss.period=1",
        "train.best_checkpoint.metric=val_loss",
        "train.best_checkpoint.mode=min",
        "train.early_stop.metric=ema/bbox/AP",
        "train.early_stop.min_delta=200",
        "train.early_stop.patience=1",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "summary.json").read_text())["iterations"] <= 2
    assert names(tmp_path).endswith("best ema final")

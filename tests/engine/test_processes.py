"""What two processes share: statistics, and the weights that they start from."""

import os

import pytest
import torch
import torch.distributed as dist
from commands import free_port
from detectron2.utils.events import EventStorage
from forked import SERVER
from own_toys import build
from torch import nn
from torch.multiprocessing import start_processes
from toys import make_batch

from dfd.distill.disparity import scale_features
from dfd.distill.processes import own_divisors, share_divisors
from dfd.engine.checks import check_same_start
from dfd.engine.stop import StopRequest
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

"""Several processes: trained and evaluated as in one; when one dies, all end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from commands import ENV, free_port, run
from detectron2.engine import default_argument_parser
from forked import forked
from plain import write_rectangles

from dfd.engine.distributed import check_flags, find_place, read_device
from dfd.engine.launch import _wait_for
from dfd.errors import UserError

pytestmark = pytest.mark.slow


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


def torchrun(config, *arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    launcher += [f"--master_port={free_port()}"]
    run = ["train_net.py", "--config-file", config, *arguments]
    return subprocess.run([*launcher, *run], capture_output=True, text=True, env=ENV)


def slurm(rank, port):
    """What srun puts into the environment of one of two tasks of one machine."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "node[1-1]",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


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


def arguments(*flags):
    parser = default_argument_parser()
    parser.set_defaults(dist_url="auto")
    return parser.parse_args(list(flags))


TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("env", "flags", "named"),
    [
        (TORCHRUN, ["--num-gpus=2"], "torchrun has started 8 processes already"),
        (slurm(0, 1), ["--num-machines=2"], "srun has started 2 processes already"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, [], "but not LOCAL_RANK"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, [], "same number of processes"),
        (slurm(0, 1) | {"SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}, [], "--ntasks-per-node"),
        (slurm(1, 1) | {"SLURM_LOCALID": "0"}, [], "numbered machine by machine"),
        ({}, ["--num-gpus=0"], "must be at least 1"),
        ({}, ["--machine-rank=1"], "the rank from 0"),
        ({}, ["--num-machines=2"], "--dist-url tcp://"),
    ],
)
def test_contradiction_between_launcher_and_flags_is_one_line(env, flags, named):
    with pytest.raises(UserError) as error:
        check_flags(arguments(*flags), find_place(env))
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_first_machine_of_a_slurm_job_is_asked_of_scontrol(tmp_path, monkeypatch):
    env = slurm(1, "") | {"MASTER_ADDR": "", "SLURM_STEP_NODELIST": "node[3-4]"}
    monkeypatch.setenv("PATH", str(tmp_path), prepend=None)
    with pytest.raises(UserError, match=r"first machine of node\[3-4\]: set MASTER_ADDR"):
        find_place(env)
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames node[3-4]" ] && echo "node3"\n')
    program.chmod(0o755)
    assert find_place(env).url == "tcp://node3:49159"


def test_batch_script_of_several_tasks_is_warned_that_it_runs_alone(capsys):
    assert find_place({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None
    assert "srun has not started this process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("launcher", "there", "device", "named"),
    [
        ("--num-gpus", 1, "cuda", "2 processes on this machine, but torch sees 1 CUDA devices"),
        ("--num-gpus", 2, "cuda:0", "one device for all processes"),
        ("--num-gpus", 1, "cpu", None),
        ("srun", 1, "cuda", None),  # Bound to one device each.
        ("srun", 2, "auto", None),
    ],
)
def test_every_process_has_a_device(launcher, there, device, named, configs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    place = find_place(slurm(0, 1)) if launcher == "srun" else None
    flags = [] if place else ["--num-gpus=2"]
    args = arguments("--config-file", configs["plain"], *flags, f"train.device={device}")
    if named is None:
        assert read_device(args, place).type == ("cpu" if device == "cpu" else "cuda")
        return
    with pytest.raises(UserError) as error:
        read_device(args, place)
    assert named in str(error.value)

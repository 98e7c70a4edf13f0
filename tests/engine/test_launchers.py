"""Flags, torchrun's and srun's environments, and the devices of several processes: no run."""

import pytest
import torch
from detectron2.engine import default_argument_parser
from launchers import slurm

from dfd.engine import argument_parser
from dfd.engine.distributed import check_flags, find_place, read_device
from dfd.errors import UserError


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


def test_flags_may_stand_anywhere():
    given = ["--config-file", "c.py", "a=1", "--resume", "+b=-2", "--num-gpus", "2", "~c"]
    args = argument_parser().parse_args(given)
    assert (args.config_file, args.resume, args.num_gpus) == ("c.py", True, 2)
    assert args.opts == ["a=1", "+b=-2", "~c"]
    assert argument_parser().parse_args(["--dry-run"]).opts == []

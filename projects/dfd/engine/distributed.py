"""Where a process stands in its run, as torchrun or Slurm tell it, and the group that it joins."""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

from ..errors import UserError
from .config.load import load_config
from .config.resolve import resolve_device

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Where a process stands in its run, and where the processes meet."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    url: str

    def __post_init__(self) -> None:
        even = self.local_size > 0 and self.world_size % self.local_size == 0
        if not even or self.rank % self.local_size != self.local_rank:
            raise UserError(
                f"{self.launcher}: process {self.rank} of {self.world_size} is number "
                f"{self.local_rank} of {self.local_size} on its machine: every machine needs the "
                "same number of processes, numbered machine by machine"
            )


def find_place(env: Mapping[str, str]) -> Place | None:
    """This process's place according to torchrun or srun; None if neither has started it."""
    if "RANK" in env and "WORLD_SIZE" in env:
        missing = [name for name in _TORCHRUN if name not in env]
        if missing:
            raise UserError(
                f"RANK and WORLD_SIZE are set, as torchrun sets them, but not {missing[0]}: start "
                "with torchrun, or unset them"
            )
        return Place("torchrun", *(int(env[name]) for name in _TORCHRUN[:4]), "env://")
    # srun sets those of its step; a batch script has those of the job, but is one process.
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return _slurm_place(env)
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NUM_TASKS" not in env:
        print(
            f"warning: the Slurm job has {env['SLURM_NTASKS']} tasks, but srun has not started "
            "this process, so it is none of them",
            file=sys.stderr,
        )
    return None


def _slurm_place(env: Mapping[str, str]) -> Place:
    # It reads "4(x2)", or "4,3" where machines differ.
    counts = re.sub(r"\(x\d+\)", "", env["SLURM_STEP_TASKS_PER_NODE"]).split(",")
    if len(set(counts)) > 1:
        raise UserError(
            f"srun has {env['SLURM_STEP_TASKS_PER_NODE']} tasks on the machines: set "
            "--ntasks-per-node, every machine needs the same number"
        )
    # One job after another on one machine must not meet; these ports are for such use.
    port = env.get("MASTER_PORT") or 49152 + int(env["SLURM_JOB_ID"]) % 16384
    return Place(
        "srun",
        int(env["SLURM_PROCID"]),
        int(env["SLURM_STEP_NUM_TASKS"]),
        int(env["SLURM_LOCALID"]),
        int(counts[0]),
        f"tcp://{env.get('MASTER_ADDR') or _first_host(env['SLURM_STEP_NODELIST'])}:{port}",
    )


def _first_host(nodes: str) -> str:
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
        return names.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            f"scontrol does not tell the first machine of {nodes}: set MASTER_ADDR to it in the "
            "batch file"
        ) from error


def check_flags(args: argparse.Namespace, place: Place | None) -> None:
    """Refuse flags that make no sense, or that contradict what has started this process."""
    flags = f"--num-gpus={args.num_gpus} --num-machines={args.num_machines}"
    if min(args.num_gpus, args.num_machines) < 1 or not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"{flags} --machine-rank={args.machine_rank}: the numbers must be at least 1, and the "
            "rank from 0 to below the number of machines"
        )
    if place is not None and args.num_gpus * args.num_machines > 1:
        raise UserError(
            f"{place.launcher} has started {place.world_size} processes already, but the flags say "
            f"{flags}: leave them out"
        )
    if place is None and args.num_machines > 1 and args.dist_url == "auto":
        raise UserError(
            f"{flags} needs --dist-url tcp://<address of machine 0>:<free port>, the same on every "
            "machine"
        )


def read_device(args: argparse.Namespace, place: Place | None) -> torch.device:
    """The kind of device that the config names, of which every process must have one.

    Raises:
        UserError: it does not suffice for the processes of this machine, or the config is bad.
    """
    cfg = load_config(args.config_file, args.opts)
    device = torch.device(resolve_device(cfg))
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise UserError(
            f"train.device is {device}, one device for all processes: set it to cuda, and "
            "CUDA_VISIBLE_DEVICES to the devices to use"
        )
    there, wanted = torch.cuda.device_count(), place.local_size if place else args.num_gpus
    # Slurm may show each task its own device alone.
    if there < wanted and not (there == 1 and place is not None and place.launcher == "srun"):
        raise UserError(
            f"{wanted} processes on this machine, but torch sees {there} CUDA devices: start "
            "fewer, or set train.device=cpu"
        )
    return device


@contextlib.contextmanager
def joined_group(place: Place, device: torch.device) -> Iterator[None]:
    """Within the context, this is one of several processes, by nccl on CUDA and gloo elsewhere.

    After an error the group is not left in good order: another process may be gone.
    """
    if device.type == "cuda":
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=place.url,
        rank=place.rank,
        world_size=place.world_size,
        # Long, because the main process evaluates and writes while the others wait. A dead
        # process is not found by it, but by what has started it, or by its closed connection.
        timeout=DEFAULT_TIMEOUT,
    )
    comm.create_local_process_group(place.local_size)
    comm.synchronize()
    yield
    # The main process may be where the others meet: it leaves last.
    comm.synchronize()
    dist.destroy_process_group()

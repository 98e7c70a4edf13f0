"""What the run's machine is, and how much of it is used."""

from __future__ import annotations

import contextlib
import platform
import resource
import sys

import torch


def peak_memory_mib() -> float:
    """Peak memory of this process so far: CUDA's allocator where it is used, else resident set."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        with open("/proc/self/status") as f:
            peak = next(line for line in f if line.startswith("VmHWM:"))
        return int(peak.split()[1]) / 2**10
    except (OSError, StopIteration):
        # Not Linux. (There, ru_maxrss would count what the parent held when it forked.)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def forget_peak_memory() -> None:
    """Let the peak begin at what is in use now, where the system can."""
    if torch.cuda.is_initialized():  # A run on CPU leaves it alone.
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def processor_name(device: str) -> str:
    """The name of the GPU or CPU that a device is; empty if it cannot be told."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as f:
            line = next(line for line in f if line.startswith("model name"))
        return line.partition(":")[2].strip()
    except (OSError, StopIteration):
        return platform.processor()

"""What the processes of a run share beside gradients. Everything here does nothing in one process.

All processes must call these together, or those that do wait for those that do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from torch import Tensor, nn

from ..weights.files import state_sha256


class _Sum(torch.autograd.Function):
    """torch.distributed.nn has one too, which newer versions deprecate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Each process's loss depends on the sum, and so on every process's x.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of a tensor of one shape over all processes, in each of them.

    Its gradient is that of the sum of all processes' losses, as DistributedDataParallel, which
    averages, needs it.
    """
    return _Sum.apply(x) if comm.get_world_size() > 1 else x


def share_buffers(model: nn.Module) -> None:
    """Give every process the main one's buffers, such as the running means of batch norms."""
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def share_divisors(detector: nn.Module) -> None:
    """Let a dense detector divide its losses by what one process would.

    RetinaNet, FCOS and their kin divide by a running mean of the positives, each process of its own
    part of the batch; YOLOX and RepPoints by their number (``divisor``). From now on it is that of
    the whole batch, and alike in all processes; a process without any positive counts as one with
    a single one in a running mean. For training: all processes must make every step.
    """
    if comm.get_world_size() == 1:
        return
    for module in detector.modules():
        # A detector with a rule of its own keeps it.
        if getattr(type(module), "_ema_update", None) is DenseDetector._ema_update:
            module._ema_update = MethodType(_update_together, module)
        if _has_divisor(module):
            module.divisor = MethodType(_divide_together, module)


def own_divisors(detector: nn.Module) -> None:
    """Let a dense detector divide its losses by its own positives of a batch, and keep no mean."""
    for module in detector.modules():
        if hasattr(module, "_ema_update"):  # Detectron2's DenseDetector has it.
            module._ema_update = _own_number
        if _has_divisor(module):  # Its class's own, in place of what share_divisors may have set.
            module.__dict__.pop("divisor", None)


def _has_divisor(module: nn.Module) -> bool:
    """Whether a detector has such a method; a layer's number of that name is none."""
    return callable(getattr(type(module), "divisor", None))


def _own_number(name: str, value: float, initial_value: float, momentum: float = 0.9) -> float:
    """In place of a running mean: what it would take in."""
    return value


def _divide_together(detector: nn.Module, positives: Tensor) -> Tensor:
    whole = type(detector).divisor(detector, sum_over_processes(positives.float()))
    # The gradients, and the losses in the log, are means over the processes.
    return whole / comm.get_world_size()


def _update_together(
    detector: DenseDetector,
    name: str,
    value: float,
    initial_value: float,
    momentum: float = 0.9,
) -> float:
    total = torch.tensor(float(value), dtype=torch.float64, device=detector.device)
    dist.all_reduce(total)
    whole = DenseDetector._ema_update(detector, name, total.item(), initial_value, momentum)
    # The gradients, and the losses in the log, are means over the processes.
    return whole / comm.get_world_size()


def same_everywhere(*states: Mapping[str, Tensor]) -> bool:
    """Whether all processes hold the same tensors, bit for bit."""
    if comm.get_world_size() == 1:
        return True
    return len(set(comm.all_gather(state_sha256(*states)))) == 1

"""What the processes of a run share beside gradients. Everything here does nothing in one process.

All processes must call these together, or those that do wait for those that do not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn


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


def same_everywhere(*states: Mapping[str, Tensor]) -> bool:
    """Whether all processes hold the same tensors, bit for bit."""
    if comm.get_world_size() == 1:
        return True
    digest = hashlib.sha256()
    for state in states:
        for name, value in state.items():
            digest.update(name.encode())
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy())
    return len(set(comm.all_gather(digest.hexdigest()))) == 1

"""In which precision the frozen teacher computes, and a copy of it that does so faster."""

from __future__ import annotations

import copy

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import nn
from torch.nn.utils import parametrize

from ..errors import UserError
from .int8 import check_int8, use_int8

PRECISIONS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the teacher's pass; "auto" is bf16 where the device has units for it.

    Else it is fp32, on CUDA too. A frozen teacher in fp16 has nothing that notices an overflow, as
    the scaler of the student's gradients does: its features would just be wrong.
    """
    if precision == "fp16" and device.type != "cuda":
        raise UserError(
            f"model.teacher.precision is fp16, which needs CUDA, but the device is {device}: use "
            "auto, bf16 or fp32"
        )
    if precision == "int8":
        check_int8(device)
    if precision != "auto":
        return PRECISIONS[precision]
    return torch.bfloat16 if has_bf16_units(device) else torch.float32


def has_bf16_units(device: torch.device) -> bool:
    """Whether a device computes in bf16 itself, and so faster, and does not emulate it."""
    if device.type == "cuda":
        try:
            return torch.cuda.is_bf16_supported(including_emulation=False)
        except TypeError:  # An older torch, which may count emulation without saying so.
            known = torch.version.hip is None and torch.cuda.is_available()
            emulated = known and torch.cuda.get_device_capability(device)[0] < 8
            return torch.cuda.is_bf16_supported() and not emulated
    if device.type == "cpu":
        # Private in torch; absent, it only means that the pass stays in fp32.
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in names)
    return False


@torch.no_grad()
def faster_copy(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a network in eval mode that computes the same faster, in lower precision or not.

    Batch norms, constants in eval mode, are folded into the convolutions before them, and the
    weights of matrix products are converted once, not once a pass: autocast keeps no copy of
    weights without gradients. Norms of other kinds stay in fp32. In the memory format
    channels-last, which its input is to have too: a CPU's kernels need no copies then.

    Args:
        dtype: of weights; int8: of convolutions alone, see ``int8``, all else in fp32.
    """
    network = copy.deepcopy(network).eval()
    of_weights = torch.float32 if dtype == torch.int8 else dtype
    for module in list(network.modules()):
        if isinstance(module, Conv2d) and _can_fold(module, module.norm):
            _fold(module, module.norm)
            module.norm = None
        # Of a module that says so (YOLOX's) alone: names do not tell which of the two comes first.
        if getattr(module, "norm_follows_conv", False):
            _fold(module.conv, module.bn)
            module.bn = nn.Identity()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            # Not module.to(), which would reach a norm within the convolution.
            module.weight.data = module.weight.to(of_weights)
            if module.bias is not None:
                module.bias.data = module.bias.to(of_weights)
    network = network.to(memory_format=torch.channels_last)
    if dtype == torch.int8 and not use_int8(network):
        raise UserError(
            "model.teacher.precision is int8, but the teacher has no convolution that it would "
            "make faster: use auto"
        )
    return network


# What computes a batch norm and nothing else, whatever derives from it.
_NORMS = {
    norm.forward
    for norm in (nn.BatchNorm2d, nn.SyncBatchNorm, NaiveSyncBatchNorm, FrozenBatchNorm2d)
}


def _can_fold(conv: Conv2d, norm: nn.Module | None) -> bool:
    """Whether a norm is a batch norm in eval mode, and comes straight behind its convolution.

    A class of its own may standardise weights, normalise first, or have an activation in its norm.
    """
    if norm is None or type(norm).forward not in _NORMS or type(conv).forward is not Conv2d.forward:
        return False
    if "forward" in {*vars(norm), *vars(conv)}:  # Of this one alone.
        return False
    if norm.running_var is None or norm.weight is None:
        return False
    hooks = [h for m in (conv, norm) for h in (m._forward_hooks, m._forward_pre_hooks)]
    return not any(hooks) and not parametrize.is_parametrized(conv)


def _fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    """Let a convolution do what the batch norm behind it does in eval mode."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    bias = 0 if conv.bias is None else conv.bias * scale
    conv.weight = nn.Parameter(conv.weight * scale.view(-1, 1, 1, 1), requires_grad=False)
    conv.bias = nn.Parameter(bias + shift, requires_grad=False)

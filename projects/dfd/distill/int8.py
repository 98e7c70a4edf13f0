"""Convolutions in 8-bit integers, for a frozen network on an x86 CPU.

Weights are rounded once, symmetrically and each output channel on its own scale; activations in
every pass, on the range that this batch has there, so that nothing has to be calibrated and a
resumed run sees the same features. Sums are exact 32-bit integers, and what goes in and out is
fp32. The kernels are oneDNN's, of which torch has the operators that its compiler uses.
"""

from __future__ import annotations

import math
import warnings

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn

from ..errors import UserError

# With fewer channels there is little to gain, and an image's own pixels are not rounded.
_FEWEST_CHANNELS = 16
# More than this, relative to fp32 on random numbers, is a fault and not rounding (1 to 3 %).
_LARGEST_ERROR = 0.1


class Int8Convolution:
    """What a convolution of Detectron2's or torch's kind does; its norm and activation in fp32."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self._norm = getattr(conv, "norm", None)
        self._activation = getattr(conv, "activation", None)
        self._bias = None if conv.bias is None else conv.bias.detach().float()
        self._geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
        weight = conv.weight.detach().float()
        largest = weight.abs().amax(dim=(1, 2, 3)).clamp(min=torch.finfo(torch.float32).tiny)
        scale = largest / _largest_weight()
        rounded = (weight / scale[:, None, None, None]).round().to(torch.int8)
        packed = torch.ops.onednn.qconv_prepack(rounded, scale, 1.0, 0, *self._geometry)
        self._weight = (packed, scale, torch.zeros(len(scale), dtype=torch.int64))

    def __call__(self, x: Tensor) -> Tensor:
        pixels, scale, zero_point = _to_bytes(x)
        finite = math.isfinite(scale)
        scale = scale if finite else 1.0
        x = torch.ops.onednn.qconv2d_pointwise(
            *(pixels, scale, zero_point, *self._weight, self._bias, *self._geometry),
            *(1.0, 0, torch.float32, "none", [], ""),  # The output: no scale, nothing fused.
        )
        if not finite:  # As in fp32, what follows is to notice.
            x.fill_(torch.nan)
        if self._norm is not None:
            x = self._norm(x)
        return x if self._activation is None else self._activation(x)


def use_int8(network: nn.Module) -> int:
    """Let the convolutions that int8 makes faster compute in it, in place.

    Returns:
        How many there are.
    """
    found = [module for module in network.modules() if _is_worth_it(module)]
    for conv in found:
        # Not another module in its place: Detectron2's FPN keeps its own in lists too.
        conv.forward = Int8Convolution(conv)
    return len(found)


def _is_worth_it(module: nn.Module) -> bool:
    # Subclasses may do something else in their forward.
    return (
        type(module) in (nn.Conv2d, Conv2d)
        and module.groups == 1
        and module.in_channels >= _FEWEST_CHANNELS
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _to_bytes(x: Tensor) -> tuple[Tensor, float, int]:
    """x as unsigned bytes in channels-last, with the scale and the zero of them."""
    x = x.float().contiguous(memory_format=torch.channels_last)
    flat = x.permute(0, 2, 3, 1).reshape(-1)  # As it lies in memory, without a copy.
    low, high = torch.aminmax(flat)
    low, high = low.clamp(max=0).item(), high.clamp(min=0).item()
    scale = max((high - low) / 255, torch.finfo(torch.float32).tiny)
    if not math.isfinite(scale):
        return torch.zeros_like(x, dtype=torch.uint8), scale, 0
    zero_point = round(-low / scale)
    if not hasattr(torch, "quantize_per_tensor"):  # Deprecated; otherwise in three passes.
        pixels = x.div(scale).add_(zero_point).round_().clamp_(0, 255).to(torch.uint8)
        return pixels, scale, zero_point
    quantized = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8)
    pixels = torch.empty(0, dtype=torch.uint8).set_(
        quantized.untyped_storage(), 0, quantized.shape, quantized.stride()
    )
    return pixels, scale, zero_point


def _largest_weight() -> int:
    """127; half of it where pairs of products are summed in 16 bits, which it would overflow."""
    has_vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)()
    return 127 if has_vnni else 63


@torch.no_grad()
def check_int8(device: torch.device) -> None:
    """
    Raises:
        UserError: this device or torch has no such convolutions, or they are wrong here.
    """
    what = "model.teacher.precision is int8"
    if device.type != "cpu":
        raise UserError(f"{what}, which is for CPUs, but the device is {device}: use auto")
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(32, 32, 3, padding=1)
    # All of one sign: where sums could overflow, these would.
    conv.weight.data = torch.rand(conv.weight.shape, generator=generator)
    conv.bias.data = torch.randn(32, generator=generator)
    x = torch.rand(2, 32, 9, 11, generator=generator) - 0.1
    try:
        with warnings.catch_warnings():  # Of an operator's end, told once a process.
            warnings.simplefilter("ignore")
            found = Int8Convolution(conv)(x)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{what}, but torch {torch.__version__} cannot do it on this machine "
            f"({str(error).splitlines()[0]}): use auto"
        ) from error
    expected = conv(x)
    error = ((found - expected).norm() / expected.norm()).item()
    if not error < _LARGEST_ERROR:
        raise UserError(
            f"{what}, but on this machine its convolutions are wrong, by {error:.0%}: use auto"
        )

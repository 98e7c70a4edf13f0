"""A way around a fault of oneDNN in bf16: gradients of convolutions of very narrow images."""

from __future__ import annotations

import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn

# Others pad by themselves, so that what reaches oneDNN is wide enough.
_FORWARDS = (nn.Conv2d.forward, Conv2d.forward)


def widen_narrow_inputs(model: nn.Module) -> None:
    """Let padded convolutions see no input that is narrower than their stride.

    In bf16 on a CPU, oneDNN (as of torch 2.14) leaves their weight's gradient unwritten then: what
    was in memory, which may be any number or NaN. P7 of an image of at most 64 pixels is such. The
    column of zeros that is added is one that the padding would have had there: nothing else
    changes. Kernels for which it would not be, which are even and padded, are left alone.
    """
    for module in model.modules():
        if not isinstance(module, nn.Conv2d) or type(module).forward not in _FORWARDS:
            continue
        if module.stride[1] > 1 and module.padding[1] > 0:
            module.register_forward_pre_hook(_widen)


def _widen(module: nn.Conv2d, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    x, *others = args
    width, stride, padding = x.shape[-1], module.stride[1], module.padding[1]
    if width >= stride or module.padding_mode != "zeros":
        return None
    reach = module.dilation[1] * (module.kernel_size[1] - 1) + 1
    columns = (width + 2 * padding - reach) // stride + 1
    # The widest input that gives as many columns.
    widest = columns * stride + reach - 2 * padding - 1
    if widest < stride:
        return None
    return (F.pad(x, (0, stride - width)), *others)

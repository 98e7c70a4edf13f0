"""Convolutions of very narrow images have their own gradient in bf16 on a CPU."""

import itertools

import pytest
import torch
from detectron2.layers import Conv2d
from torch import nn

from dfd.engine.narrow_inputs import widen_narrow_inputs
from dfd.engine.trainer import Trainer


class OneLevel(nn.Module):
    """A strided convolution of maps that are one cell wide, as P7 of a small image is."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.conv = kind(32, 32, 3, stride=2, padding=1, bias=False)

    def forward(self, x):
        return {"loss": (self.conv(x).float() * torch.arange(32.0)[:, None, None]).sum()}


@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2d])
def test_gradient_in_bf16_is_that_of_fp32(kind):
    x = torch.randn(2, 32, 5, 1, generator=torch.Generator().manual_seed(0))
    gradients = {}
    for amp in (None, "bf16"):
        model = OneLevel(kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        trainer = Trainer(model, [x] * 5, optimizer, device="cpu", amp=amp)
        found = gradients.setdefault(amp, [])
        model.conv.weight.register_post_accumulate_grad_hook(
            lambda weight, found=found: found.append(weight.grad.clone())
        )
        trainer.train(0, 5)
    expected = gradients[None][0]
    assert len(gradients["bf16"]) == 5
    for gradient in gradients["bf16"]:
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0.02 * expected.abs().max())


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, 7])
def test_output_stays_what_it_was(kernel):
    widened = []
    for stride, padding, dilation, width in itertools.product(
        (1, 2, 3, 4), (0, 1, 2, 3), (1, 2), (1, 2, 3)
    ):
        if width + 2 * padding < dilation * (kernel - 1) + 1:
            continue
        conv = nn.Conv2d(4, 4, kernel, stride, padding, dilation)
        x = torch.randn(1, 4, 9 * kernel, width)
        expected = conv(x)
        widen_narrow_inputs(conv)
        conv.register_forward_pre_hook(lambda _, args, x=x: widened.append(args[0] is not x))
        torch.testing.assert_close(conv(x), expected)
    assert any(widened)

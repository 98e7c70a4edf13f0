"""Deformable convolutions, on their own and in the blocks of a ResNet."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock

from dfd.distill.precision import faster_copy
from dfd.modeling import DeformConvBlock
from dfd.modeling.reppoints import DeformConv


@pytest.mark.parametrize("place", ["y", "x"])
def test_offsets_are_y_then_x_in_cells(place):
    torch.manual_seed(0)
    conv = DeformConv(4, 6, 3, padding=1)
    x = torch.randn(2, 4, 7, 9)
    offset = torch.zeros(2, 18, 7, 9)
    offset[:, int(place == "x") :: 2] = 1
    shifted = F.pad(x, (0, 1, 0, 0))[..., 1:] if place == "x" else F.pad(x, (0, 0, 0, 1))[:, :, 1:]
    expected = F.conv2d(shifted, conv.weight, padding=1)
    inside = (..., slice(1, -1), slice(1, -1))  # Padding is shifted too.
    torch.testing.assert_close(conv(x, offset)[inside], expected[inside])


def test_half_precision_is_computed_in_full():
    torch.manual_seed(0)
    conv = DeformConv(4, 6, 3, padding=1)
    x, offset = torch.randn(1, 4, 5, 5).bfloat16(), torch.randn(1, 18, 5, 5).bfloat16()
    expected = conv(x.float(), offset.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = conv(x, offset)
    assert torch.equal(found, expected)


BLOCKS = [
    {},
    {"stride": 2},
    {"stride": 2, "stride_in_1x1": True},
    {"num_groups": 4},
    {"dilation": 2, "norm": "FrozenBN"},
]


@pytest.mark.parametrize("settings", BLOCKS, ids=str)
def test_a_block_begins_as_a_plain_one(settings):
    torch.manual_seed(0)
    sizes = {"in_channels": 8, "out_channels": 16, "bottleneck_channels": 8}
    plain = BottleneckBlock(**sizes, **settings)
    block = DeformConvBlock(**sizes, **settings)
    result = block.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert result.missing_keys == ["conv2.conv_offset.weight", "conv2.conv_offset.bias"]
    assert block.stride == plain.stride
    x = torch.randn(2, 8, 10, 12)
    torch.testing.assert_close(block(x), plain(x))
    block(x).square().sum().backward()
    assert block.conv2.conv_offset.weight.grad.abs().max() > 0


def test_a_resnet_of_such_blocks_under_autocast():
    torch.manual_seed(0)
    stages = [
        ResNet.make_stage(
            DeformConvBlock if stage else BottleneckBlock,
            2,
            stride_per_block=[1 + (stage > 0), 1],
            in_channels=8 * 2 ** max(stage - 1, 0) if stage else 4,
            out_channels=8 * 2**stage,
            bottleneck_channels=8,
            num_groups=4,
            norm="BN",
        )
        for stage in range(2)
    ]
    trunk = ResNet(BasicStem(3, 4), stages, out_features=["res3"])
    torch.nn.init.normal_(trunk.res3[0].conv2.conv_offset.bias, std=0.5)
    images = torch.randn(2, 3, 64, 64)
    full = trunk(images)["res3"]
    assert full.shape == (2, 16, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = trunk(images)["res3"]
    assert (half.float() - full).abs().max() < 0.05 * full.abs().max()
    half.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in trunk.parameters())
    # As a frozen teacher's pyramid runs.
    frozen = faster_copy(trunk, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        low = frozen(images)["res3"]
    with torch.no_grad():
        full = trunk.eval()(images)["res3"]
    assert (low.float() - full).abs().max() < 0.05 * full.abs().max()

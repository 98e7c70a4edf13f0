"""A frozen network's convolutions in 8-bit integers."""

import pytest
import torch
import toys
from detectron2.layers import Conv2d
from torch import nn

from dfd import FrozenTeacher, UserError
from dfd.distill import int8
from dfd.distill.int8 import Int8Convolution, check_int8, use_int8
from dfd.distill.precision import faster_copy, resolve_precision

CPU = torch.device("cpu")


def off(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 1, "bias": False},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "dilation": 2, "padding": 2},
        {"kernel_size": (1, 3), "padding": (0, 1)},
    ],
)
@pytest.mark.parametrize("shift", [0.0, 2.0, -2.0])
def test_it_rounds_and_no_more(settings, shift):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, **settings)
    # Each channel on a scale of its own, and a map of any sign beside a padding of zero.
    conv.weight.data *= torch.logspace(-4, 2, 24)[:, None, None, None]
    x = draw(2, 16, 9, 11) + shift
    found, expected = Int8Convolution(conv)(x), conv(x)
    assert found.shape == expected.shape and found.dtype == torch.float32
    for channel in range(24):
        assert 0 < off(found[:, channel], expected[:, channel]) < 0.05
    assert torch.equal(Int8Convolution(conv)(x), found)
    plain = Int8Convolution(conv)(x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(plain, found)


def test_its_norm_and_activation_follow():
    torch.manual_seed(0)
    conv = Conv2d(32, 32, 3, padding=1, norm=nn.GroupNorm(4, 32), activation=nn.functional.relu)
    x = draw(1, 32, 8, 8)
    assert off(Int8Convolution(conv)(x), conv(x)) < 0.05


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value):
    x = draw(1, 16, 4, 4)
    x[0, 3, 2, 2] = value
    assert Int8Convolution(nn.Conv2d(16, 8, 3))(x).isnan().all()


def test_a_map_of_zeros():
    conv = nn.Conv2d(16, 8, 1)
    x = torch.zeros(1, 16, 4, 4)
    torch.testing.assert_close(Int8Convolution(conv)(x), conv(x))


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_left_alone():
    convs = {
        "few": nn.Conv2d(3, 16, 3),
        "depthwise": nn.Conv2d(16, 16, 3, groups=16),
        "own": Doubled(16, 16, 3),
        "same": nn.Conv2d(16, 16, 3, padding="same"),
        "mirrored": nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
    }
    network = nn.ModuleDict(convs)
    assert use_int8(network) == 0
    with pytest.raises(UserError, match="no convolution that it would make faster"):
        faster_copy(network, torch.int8)
    assert use_int8(nn.ModuleDict({**convs, "more": nn.Conv2d(16, 16, 3)})) == 1


def test_every_convolution_of_a_pyramid_is_reached():
    """Detectron2's FPN keeps its convolutions in lists beside the modules."""
    network = toys.build("retinanet", seed=0).eval().backbone
    x = draw(1, 3, 64, 64)
    expected = network(x)
    copy = faster_copy(network, torch.int8)
    calls = []
    for module in copy.modules():
        if isinstance(getattr(module, "forward", None), Int8Convolution):
            module.forward = lambda x, f=module.forward: calls.append(f) or f(x)
    found = copy(x.contiguous(memory_format=torch.channels_last))
    assert len(calls) == sum(
        isinstance(m, nn.Conv2d) and m.in_channels >= 16 for m in network.modules()
    )
    for name, features in expected.items():
        assert 0 < off(found[name], features) < 0.1


def test_a_teachers_pass():
    passes = {}
    for precision in ("fp32", "int8"):
        torch.manual_seed(0)
        teacher = FrozenTeacher(
            model=toys.build("faster_rcnn", seed=1), allow_random=True, precision=precision
        )
        before = {k: v.clone() for k, v in teacher.model.state_dict().items()}
        passes[precision] = teacher(toys.make_batch(), input_format="BGR")
        again = teacher(toys.make_batch(), input_format="BGR")
        assert all(torch.equal(again[k], v) for k, v in passes[precision].items())
        assert all(torch.equal(v, before[k]) for k, v in teacher.model.state_dict().items())
    for name, features in passes["fp32"].items():
        assert features.dtype == passes["int8"][name].dtype == torch.float32
        assert 0 < off(passes["int8"][name], features) < 0.1


def test_where_it_cannot_be(monkeypatch):
    assert resolve_precision("int8", CPU) == torch.int8
    with pytest.raises(UserError, match="for CPUs, but the device is cuda"):
        resolve_precision("int8", torch.device("cuda"))

    def wrong(self, x):
        return conv(x) * 1.5

    def missing(self, x):
        raise AttributeError("'_OpNamespace' 'onednn' object has no attribute 'qconv2d_pointwise'")

    conv = nn.Conv2d(32, 32, 3, padding=1)
    monkeypatch.setattr(int8.Int8Convolution, "__call__", wrong)
    with pytest.raises(UserError, match="on this machine its convolutions are wrong, by"):
        check_int8(CPU)
    monkeypatch.setattr(int8.Int8Convolution, "__call__", missing)
    with pytest.raises(UserError, match=r"cannot do it on this machine \('_OpNamespace'"):
        check_int8(CPU)


def test_weights_have_seven_bits_where_sums_could_overflow(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False, raising=False)
    conv = nn.Conv2d(16, 16, 3)
    x = draw(1, 16, 6, 6)
    assert int8._largest_weight() == 63
    made = Int8Convolution(conv)
    assert off(made(x), conv(x)) < 0.05
    scales = conv.weight.detach().abs().amax((1, 2, 3)) / 63
    torch.testing.assert_close(made._weight[1].flatten().float(), scales)
    monkeypatch.delattr(torch.cpu, "_is_vnni_supported")
    assert int8._largest_weight() == 63


def test_without_the_deprecated_operator(monkeypatch):
    conv = nn.Conv2d(16, 16, 3)
    x = draw(1, 16, 6, 6)
    found = Int8Convolution(conv)(x)
    monkeypatch.delattr(torch, "quantize_per_tensor")
    torch.testing.assert_close(Int8Convolution(conv)(x), found, rtol=0.02, atol=0.02)

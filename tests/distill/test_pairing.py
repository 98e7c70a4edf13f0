import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from dfd import UserError
from dfd.distill.adapters import make_adapter
from dfd.distill.pairing import pair_levels
from dfd.distill.real_pixels import RealPixels
from dfd.distill.same_cells import crop_to_images


def shapes(**strides):
    return {name: ShapeSpec(channels=8, stride=stride) for name, stride in strides.items()}


def test_levels_are_paired_by_stride_not_by_position_or_name():
    pairs = pair_levels(shapes(p3=8, p4=16, p5=32), shapes(a=4, b=8, p3=16, c=64))
    assert [(p.name, p.teacher_name, p.stride) for p in pairs] == [("p3", "b", 8), ("p4", "p3", 16)]


def test_levels_restrict_the_pairs():
    pairs = pair_levels(shapes(p3=8, p4=16), shapes(p3=8, p4=16), levels=["p4"])
    assert [p.name for p in pairs] == ["p4"]


@pytest.mark.parametrize(
    ("student", "teacher", "levels"),
    [
        (shapes(p3=8), shapes(p4=16), None),
        (shapes(p3=8), shapes(p3=8), ["p5"]),
        (shapes(p3=8), shapes(p3=8), []),
    ],
)
def test_nothing_to_pair_lists_both_sides(student, teacher, levels):
    with pytest.raises(UserError) as error:
        pair_levels(student, teacher, levels)
    assert "student: p3 (stride 8, 8 channels); teacher: p" in str(error.value)


@pytest.mark.parametrize("level", [{"p3": ShapeSpec(channels=8)}, {"p3": ShapeSpec(stride=8)}])
def test_levels_that_say_too_little_of_themselves_are_refused(level):
    with pytest.raises(UserError, match="teacher's level p3 has .* it must give both"):
        pair_levels(shapes(p3=8), level)


def test_two_levels_of_one_stride_are_refused():
    with pytest.raises(UserError, match="res4 and res5 have the same stride 16"):
        pair_levels(shapes(res4=16, res5=16), shapes(p4=16))


def test_valid_cells_are_those_that_hold_a_real_pixel():
    valid = RealPixels([(17, 16), (32, 1)]).cells(stride=16, height=3, width=2)
    expected = torch.tensor([[[1, 0], [1, 0], [0, 0]], [[1, 0], [1, 0], [0, 0]]], dtype=torch.bool)
    assert torch.equal(valid, expected)


def test_image_without_padding_is_valid_everywhere():
    # ceil(33 / 16) x ceil(50 / 16) cells, as a network with odd kernels makes them.
    assert RealPixels([(33, 50)]).cells(stride=16, height=3, width=4) is None
    assert RealPixels([(32, 50)]).cells(stride=16, height=3, width=4) is not None


def test_crop_keeps_the_top_left_corner_that_an_image_fills():
    student, teacher = torch.rand(2, 2, 5, 9), torch.rand(2, 3, 7, 4)
    s, t = crop_to_images(student, teacher, [(80, 80), (80, 30)], stride=16)
    assert torch.equal(s, student[..., :5, :4])
    assert torch.equal(t, teacher[..., :5, :4])
    s, t = crop_to_images(student, teacher, [(17, 48), (40, 30)], stride=16)
    assert torch.equal(s, student[..., :3, :3])
    assert torch.equal(t, teacher[..., :3, :3])


def test_adapter_only_where_channels_differ():
    assert isinstance(make_adapter("auto", 4, 4), nn.Identity)
    assert make_adapter("auto", 4, 6)(torch.rand(1, 4, 5, 5)).shape == (1, 6, 5, 5)
    assert make_adapter("conv1x1", 4, 4).kernel_size == (1, 1)
    assert make_adapter("conv3x3", 4, 6)(torch.rand(1, 4, 5, 5)).shape == (1, 6, 5, 5)
    mlp = make_adapter("mlp", 4, 6)
    features = 10 * torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    assert mlp(features).shape == (1, 6, 5, 5)
    # Each cell by itself, and its length and offset say nothing.
    torch.testing.assert_close(mlp(features)[..., :2, :3], mlp(features[..., :2, :3]))
    torch.testing.assert_close(mlp(3 * features + 1), mlp(features), atol=1e-3, rtol=1e-3)
    assert isinstance(make_adapter(lambda i, o: nn.Conv2d(i, o, 5), 4, 6), nn.Conv2d)


@pytest.mark.parametrize(("kind", "out"), [("none", 6), ("linear", 4)])
def test_unusable_adapter_is_refused(kind, out):
    with pytest.raises(UserError, match="model.head.adapter"):
        make_adapter(kind, 4, out)

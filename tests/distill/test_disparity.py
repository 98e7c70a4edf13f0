import pytest
import torch

from dfd.distill.disparity import channel_means, disparity_map, scale_features, split_regions


def pair(seed=0, shape=(2, 3, 4, 5)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def test_channel_scale_forgets_scale_and_offset_of_every_channel():
    student, teacher = pair()
    s, _ = scale_features(student, teacher, None, "channel")
    gain = torch.tensor([2.0, 0.5, 30]).view(1, 3, 1, 1)
    moved, _ = scale_features(student * gain + 7, teacher, None, "channel")
    torch.testing.assert_close(s, moved, rtol=1e-4, atol=1e-4)


def test_channel_scale_disparity_is_two_times_one_minus_pearson():
    student, teacher = pair()
    s, t = scale_features(student, teacher, None, "channel")
    flat = [x.transpose(0, 1).flatten(1) for x in (student, teacher)]
    pearson = torch.stack(
        [torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(*flat, strict=True)]
    ).mean()
    torch.testing.assert_close(disparity_map(s, t).mean(), 2 * (1 - pearson))


def test_level_scale_divides_both_by_the_teachers_standard_deviation():
    student, teacher = pair()
    s, t = scale_features(student, teacher * 10, None, "level")
    std = (teacher * 10).std(correction=0)
    torch.testing.assert_close(s, student / std)
    torch.testing.assert_close(t, teacher * 10 / std)


@pytest.mark.parametrize("scale", ["channel", "level"])
def test_scale_counts_only_valid_cells(scale):
    student, teacher = pair()
    valid = torch.zeros(2, 4, 5, dtype=torch.bool)
    valid[:, :3, :2] = True
    inside = scale_features(student[..., :3, :2], teacher[..., :3, :2], None, scale)
    masked = scale_features(student, teacher, valid, scale)
    for ours, expected in zip(masked, inside, strict=True):
        torch.testing.assert_close(ours[..., :3, :2], expected)


def test_constant_channel_has_finite_gradient():
    student = torch.ones(1, 2, 3, 3, requires_grad=True)
    s, t = scale_features(student, torch.ones(1, 2, 3, 3), None, "channel")
    (s - t).square().sum().backward()
    assert student.grad.isfinite().all()


def test_split_at_multiples_of_each_images_own_mean():
    disparity = torch.tensor([[[1.0, 2, 3, 6]], [[10.0, 20, 30, 60]]])
    # Means 3 and 30: above 1 x mean lies only the last cell of each image.
    torch.testing.assert_close(
        split_regions(disparity, None, "mean", [1.0]), torch.tensor([[[0, 0, 0, 1]]] * 2)
    )
    torch.testing.assert_close(
        split_regions(disparity, None, "mean", [0.5, 1.5]), torch.tensor([[[0, 1, 1, 2]]] * 2)
    )


def test_split_at_quantiles_gives_each_region_its_share():
    disparity = torch.rand(3, 10, 10, generator=torch.Generator().manual_seed(0))
    regions = split_regions(disparity, None, "quantile", [0.2, 0.7])
    for image in regions:
        assert [int((image == k).sum()) for k in range(3)] == [20, 50, 30]


@pytest.mark.parametrize("split", ["mean", "quantile"])
def test_split_ignores_padding(split):
    disparity = torch.tensor([[[1.0, 2, 3, 6, 1e6]]])
    valid = torch.tensor([[[True, True, True, True, False]]])
    torch.testing.assert_close(
        split_regions(disparity, valid, split, [0.75]),
        torch.cat(
            [split_regions(disparity[..., :4], None, split, [0.75]), torch.tensor([[[-1]]])], dim=2
        ),
    )


def test_a_single_cell_in_all_says_nothing_at_channel_scale():
    student, teacher = pair(shape=(1, 3, 1, 1))
    s, t = scale_features(student, teacher, None, "channel")
    assert not s.any() and not t.any()


def test_cosine_measure_ignores_lengths():
    student, teacher = pair()
    gain = torch.rand(2, 1, 4, 5) + 0.5
    expected = disparity_map(student, teacher, "cosine")
    torch.testing.assert_close(disparity_map(student * gain, teacher, "cosine"), expected)
    torch.testing.assert_close(
        disparity_map(-teacher, teacher, "cosine"), torch.full((2, 4, 5), 2.0)
    )


def test_relative_disparity_is_a_share_of_the_energy():
    student = torch.tensor([3.0, 30.0, 0.0]).view(1, 1, 1, 3)
    teacher = torch.tensor([1.0, 28.0, 0.0]).view(1, 1, 1, 3)
    expected = torch.tensor([4 / 10, 4 / (900 + 784), 0.0]).view(1, 1, 3)
    torch.testing.assert_close(disparity_map(student, teacher, "relative"), expected)


def test_channel_means_and_their_gradients():
    s, t = (x.double().requires_grad_() for x in pair())
    means = channel_means(s, t)
    expected = ((s - t) ** 2, s * t, s**2, t**2)
    for mean, values in zip(means, expected, strict=True):
        torch.testing.assert_close(mean, values.mean(dim=1))
    assert torch.autograd.gradcheck(channel_means, (s, t))
    # As in training, where the teacher needs none.
    assert torch.autograd.gradcheck(lambda s: channel_means(s, t.detach()), (s,))

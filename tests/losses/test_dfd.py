from collections import Counter

import pytest
import torch

from dfd import UserError
from dfd.distill.disparity import scale_features
from dfd.losses import DFDLoss
from dfd.losses.base import LevelFeatures
from dfd.losses.dfd import smooth_cost

LENIENT = ["tail", "direction", "tolerance", "context", "smooth"]


def pair(seed=0, shape=(2, 4, 5, 6)):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=generator).requires_grad_()
    return student, torch.randn(shape, generator=generator)


def by_hand(cost, student, teacher):
    """One image of two cells, scale none: the loss of a DFDLoss, region means halved."""
    loss = DFDLoss(**{"scale": "none", "weight": 1.0, "leniency": 1.0} | cost)
    return loss(torch.tensor(student).view(1, -1, 1, 2), torch.tensor(teacher).view(1, -1, 1, 2))


# Channels a, b of two cells. Cell 0 differs by (1, 0): disparity 0.5. Cell 1 differs by (4, 0):
# disparity 8. The mean is 4.25, so cell 0 is the low region and cell 1 the high one.
STUDENT = [[2.0, 6.0], [1.0, 1.0]]
TEACHER = [[1.0, 2.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(lenient_on="none"), (0.5 + 8) / 2),
        # A tail beyond 1: 2 * 1 * 4 - 1 = 7 for the one channel, a mean of 3.5.
        (dict(lenient_on="high", lenient="tail", delta=1.0), (0.5 + 3.5) / 2),
        (
            dict(lenient_on="high", lenient="tail", delta=1.0, leniency=0.25),
            (0.5 + 0.75 * 8 + 0.25 * 3.5) / 2,
        ),
        (dict(lenient_on="high", lenient="tail", delta=1.0, leniency=0.0), (0.5 + 8) / 2),
        (dict(lenient_on="low", lenient="tail", delta=0.5), (0.375 + 8) / 2),
        # Forgiven 0.5: (4 - 0.5)^2 / 2.
        (dict(lenient_on="high", lenient="tolerance", tolerance=0.5), (0.5 + 6.125) / 2),
        # |t|^2 / C = 5 / 2; cos((6, 1), (2, 1)) = 13 / sqrt(37 * 5).
        (
            dict(lenient_on="high", lenient="direction"),
            (0.5 + 2.5 * 2 * (1 - 13 / 185**0.5)) / 2,
        ),
        # The mean difference over both cells: (1 + 4) / 2 in one of two channels, in either cell.
        (dict(lenient_on="high", lenient="smooth"), (0.5 + 3.125) / 2),
        (dict(lenient_on="none", average="all"), (0.5 + 8) / 2),
        (dict(lenient_on="none", region_weights=[0, 1]), 8.0),
        (dict(lenient_on="none", region_weights=[3, 1], weight=10), 10 * (1.5 + 8)),
    ],
)
def test_value_by_hand(settings, expected):
    torch.testing.assert_close(by_hand(settings, STUDENT, TEACHER), torch.tensor(expected))


def test_leniency_ends_where_the_teacher_is_sure():
    student = torch.tensor(STUDENT).view(1, 2, 1, 2)
    teacher = torch.tensor(TEACHER).view(1, 2, 1, 2)
    loss = DFDLoss(
        weight=1.0, scale="none", lenient="tail", delta=1.0, leniency=0.8, certainty=True
    )
    assert loss.needs_objectness and not DFDLoss().needs_objectness
    for sure in (0.0, 0.25, 1.0):
        # Cell 0 is strict anyway, so it matters of cell 1 alone.
        objectness = torch.tensor([[[0.7, sure]]])
        leniency = 0.8 * (1 - sure)
        expected = (0.5 + (1 - leniency) * 8 + leniency * 3.5) / 2
        value = loss(student, teacher, objectness=objectness)
        torch.testing.assert_close(value, torch.tensor(expected))
    with pytest.raises(ValueError, match="certainty=True.* needs objectness"):
        loss(student, teacher)


def test_leniency_is_annealed():
    student = torch.tensor(STUDENT).view(1, 2, 1, 2)
    teacher = torch.tensor(TEACHER).view(1, 2, 1, 2)
    settings = dict(weight=1.0, scale="none", lenient="tail", leniency=[1.0, 0.2])
    loss = DFDLoss(**settings, anneal_iters=4)
    of_run = DFDLoss(**settings)
    for iteration, leniency in ((0, 1.0), (1, 0.8), (4, 0.2), (9, 0.2)):
        expected = (0.5 + (1 - leniency) * 8 + leniency * 3.5) / 2
        value = loss(student, teacher, iteration=iteration, max_iter=100)
        torch.testing.assert_close(value, torch.tensor(expected))
        value = of_run(student, teacher, iteration=iteration, max_iter=4)
        torch.testing.assert_close(value, torch.tensor(expected))


def test_by_default_a_training_begins_strict_and_ends_lenient():
    student, teacher = pair()
    criterion = DFDLoss()
    for iteration, leniency in ((0, 0.0), (25, 0.25), (100, 1.0)):
        level = LevelFeatures(student, teacher, iteration=iteration, max_iter=100)
        torch.testing.assert_close(criterion(level), DFDLoss(leniency=leniency)(student, teacher))
    strict, lenient = (DFDLoss(leniency=v)(student, teacher) for v in (0.0, 1.0))
    assert not torch.isclose(strict, lenient)


def test_leniency_over_a_training_of_unknown_length_is_that_of_its_end(caplog, monkeypatch):
    monkeypatch.setattr("detectron2.utils.logger._LOG_COUNTER", Counter())  # Told once a process.
    student, teacher = pair()
    loss = DFDLoss(leniency=[0.0, 0.7])
    with caplog.at_level("WARNING", logger="dfd.losses.dfd"):
        value = loss(student, teacher, iteration=3)
    torch.testing.assert_close(value, DFDLoss(leniency=0.7)(student, teacher))
    assert "whose length is not known here" in caplog.text


def test_smooth_asks_nothing_of_what_changes_from_cell_to_cell():
    """And the mean over a window leaves padding out."""
    teacher = pair(shape=(1, 3, 6, 8))[1]
    columns = torch.tensor([1.0, -2.0, 1.0]).repeat(3)[:8]
    ripple = columns * torch.ones(1, 3, 6, 8)  # Its mean over three columns is zero.
    loss = DFDLoss(scale="none", lenient="smooth", lenient_on="all", num_regions=1)
    inner = torch.zeros(1, 6, 8, dtype=torch.bool)
    inner[..., 1:-1] = True
    s, t = teacher + ripple, teacher
    cost = smooth_cost(s, t, None, 3)
    torch.testing.assert_close(cost[..., 1:-1], torch.zeros(1, 6, 6), atol=1e-10, rtol=0)
    assert loss(s, t) > 0  # At the border the window has two columns.
    constant = smooth_cost(t + 2, t, inner, 3)
    torch.testing.assert_close(constant[inner], torch.full((36,), 4.0))


def test_measure_decides_which_cells_are_of_high_disparity():
    # The first cell is too long, the second points elsewhere.
    student = torch.tensor([[6.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    teacher = torch.tensor([[2.0, 1.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    expected = {"squared": (4.5, 8.0, 1.0), "cosine": (0.5, 1.0, 8.0)}
    for measure, (mean, high, low) in expected.items():
        criterion = DFDLoss(measure=measure, scale="none", lenient_on="none")
        criterion(student, teacher)
        stats = {key: value.item() for key, value in criterion.stats.items()}
        assert stats["disparity"] == pytest.approx(mean)
        assert (stats["term_high"], stats["term_low"]) == pytest.approx((high, low))


def test_region_average_keeps_a_small_region_from_drowning():
    student = torch.zeros(1, 1, 1, 100)
    student[..., 0] = 10.0
    teacher = torch.zeros(1, 1, 1, 100)
    settings = dict(weight=1.0, scale="none", lenient_on="none")
    torch.testing.assert_close(
        DFDLoss(average="region", **settings)(student, teacher), torch.tensor(50.0)
    )
    torch.testing.assert_close(
        DFDLoss(average="all", **settings)(student, teacher), torch.tensor(1.0)
    )


# Not "context": a reconstruction costs something until its generator has learnt it.
@pytest.mark.parametrize("lenient", ["tail", "direction", "tolerance", "smooth"])
@pytest.mark.parametrize("scale", ["channel", "level", "none"])
def test_student_equal_to_teacher_costs_nothing(lenient, scale):
    teacher = pair()[1]
    loss = DFDLoss(lenient=lenient, scale=scale)(teacher.clone(), teacher)
    torch.testing.assert_close(loss, torch.tensor(0.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("lenient", LENIENT)
@pytest.mark.parametrize("lenient_on", ["high", "low"])
def test_gradient_reaches_the_student_and_never_the_teacher(lenient, lenient_on):
    student, teacher = pair()
    teacher.requires_grad_()
    DFDLoss(lenient=lenient, lenient_on=lenient_on, channels=4)(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("lenient", LENIENT)
@pytest.mark.parametrize("scale", ["channel", "level", "none"])
@pytest.mark.parametrize("split", ["mean", "quantile"])
def test_padding_is_never_distilled(lenient, scale, split):
    torch.manual_seed(0)
    criterion = DFDLoss(lenient=lenient, scale=scale, split=split, channels=4)
    student, teacher = pair()
    small = criterion(student, teacher, torch.ones(2, 5, 6, dtype=torch.bool))
    torch.testing.assert_close(small, criterion(student, teacher, None))

    valid = torch.zeros(2, 8, 9, dtype=torch.bool)
    valid[:, :5, :6] = True
    padded = [torch.full((2, 4, 8, 9), 50.0 * i) for i in (1, -3)]
    for canvas, features in zip(padded, (student, teacher), strict=True):
        canvas[..., :5, :6] = features.detach()
    torch.testing.assert_close(criterion(*padded, valid), small.detach())


def test_weight_keeps_its_meaning_at_another_resolution_width_and_batch():
    student, teacher = (x.detach() for x in pair())
    criterion = DFDLoss()
    loss = criterion(student, teacher)
    for repeats in ((1, 1, 4, 4), (1, 3, 1, 1), (5, 1, 1, 1)):
        torch.testing.assert_close(
            criterion(student.repeat(repeats), teacher.repeat(repeats)), loss
        )


def test_empty_region_leaves_its_weight_to_the_others():
    """A level of one cell, or of equal disparity, has no high region."""
    criterion = DFDLoss(weight=1.0, scale="none", lenient_on="none")
    for cells in ((1, 1), (4, 4)):
        loss = criterion(torch.ones(2, 3, *cells), torch.zeros(2, 3, *cells))
        torch.testing.assert_close(loss, torch.tensor(1.0))


@pytest.mark.parametrize("lenient", LENIENT)
def test_no_valid_cell_gives_zero_and_a_finite_gradient(lenient):
    student, teacher = pair()
    loss = DFDLoss(lenient=lenient, channels=4)(
        student, teacher, torch.zeros(2, 5, 6, dtype=torch.bool)
    )
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_context_does_not_see_the_lenient_cells():
    torch.manual_seed(0)
    student, teacher = (x.detach() for x in pair())
    criterion = DFDLoss(lenient="context", scale="none", channels=4, region_weights=[0, 1])
    before = criterion(student, teacher)
    gap = (student - teacher).square().mean(1)
    high = gap > gap.mean(dim=(1, 2), keepdim=True)
    # The high cells move along the difference, so they stay the high ones.
    moved = torch.where(high.unsqueeze(1), teacher + 1.5 * (student - teacher), student)
    s_high = criterion(moved, teacher)
    still_high = (moved - teacher).square().mean(1)
    assert torch.equal(still_high > still_high.mean(dim=(1, 2), keepdim=True), high)
    torch.testing.assert_close(s_high, before)


def test_stats_tell_what_the_regions_are():
    student, teacher = pair()
    criterion = DFDLoss(weight=1.0, scale="level", num_regions=3, split="quantile")
    loss = criterion(student, teacher)
    stats = criterion.stats
    assert set(stats) == {"disparity"} | {
        f"{what}_r{k}" for what in ("share", "term") for k in range(3)
    }
    torch.testing.assert_close(sum(stats[f"share_r{k}"] for k in range(3)), torch.tensor(1.0))
    torch.testing.assert_close(sum(stats[f"term_r{k}"] for k in range(3)) / 3, loss.detach())
    s, t = scale_features(student, teacher, None, "level")
    torch.testing.assert_close(stats["disparity"], (s - t).square().mean().detach())
    assert not any(value.requires_grad for value in stats.values())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (dict(scale="batch"), "scale is 'batch'"),
        (dict(measure="l1"), "measure is 'l1'"),
        (dict(lenient="softly"), "lenient is 'softly'"),
        (dict(lenient_on="middle"), "lenient_on='middle'"),
        (dict(lenient_on=[2]), "lenient_on=[2]"),
        (dict(split="median"), "split is 'median'"),
        (dict(average="none"), "average is 'none'"),
        (dict(num_regions=0), "num_regions is 0"),
        (dict(num_regions=3, thresholds=[1.0]), "thresholds=[1.0]"),
        (dict(num_regions=3, thresholds=[2.0, 1.0]), "thresholds=[2.0, 1.0]"),
        (dict(split="quantile", thresholds=[1.0]), "thresholds=[1.0]"),
        (dict(region_weights=[1.0]), "region_weights=[1.0]"),
        (dict(region_weights=[0, 0]), "region_weights=[0.0, 0.0]"),
        (dict(delta=0), "delta is 0"),
        (dict(tolerance=-1), "tolerance is -1"),
        (dict(leniency=1.5), "leniency=1.5"),
        (dict(leniency=float("nan")), "leniency=nan"),
        (dict(weight=-1), "weight is -1"),
        *((dict([(key, "much")]), f"{key} is 'much'") for key in ("weight", "delta", "tolerance")),
        (dict(leniency="much"), "leniency='much'"),
        (dict(leniency=2), "leniency=2"),
        (dict(leniency=[0, 2]), "leniency=[0, 2]"),
        (dict(leniency=[0, 0.5, 1]), "leniency=[0, 0.5, 1]"),
        (dict(leniency=True), "leniency=True"),
        (dict(leniency=0.5, anneal_iters=5), "anneal_iters=5"),
        (dict(leniency=[0, 1], anneal_iters=0), "anneal_iters=0"),
        (dict(window=4), "window is 4"),
        (dict(window="wide"), "window is 'wide'"),
        (dict(num_regions=2.5), "num_regions is 2.5"),
        # With every cell hidden from the generator, the student would get no gradient.
        (dict(lenient="context", lenient_on="all"), "lenient='context'"),
        (dict(lenient="context", num_regions=1), "lenient='context'"),
    ],
)
def test_bad_setting_is_named(settings, named):
    with pytest.raises(UserError) as error:
        DFDLoss(**settings)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_shapes_that_would_broadcast_are_refused():
    criterion = DFDLoss()
    with pytest.raises(ValueError, match="one shape"):
        criterion(torch.zeros(1, 4, 5, 6), torch.zeros(1, 1, 5, 6))
    with pytest.raises(ValueError, match="valid must be bool"):
        criterion(torch.zeros(2, 4, 5, 6), torch.zeros(2, 4, 5, 6), torch.ones(2, 1, 6).bool())


@pytest.mark.parametrize("leniency", [[0, 1], [1, 0]])
def test_a_generator_has_a_gradient_at_every_leniency(leniency):
    """DistributedDataParallel waits for the gradient of every parameter."""
    criterion = DFDLoss(lenient="context", leniency=leniency, channels=4)
    for iteration in (0, 5, 10):
        criterion.zero_grad()
        level = LevelFeatures(*pair(), iteration=iteration, max_iter=10)
        loss = criterion(level)
        loss.backward()
        assert all(p.grad is not None for p in criterion.parameters())
        done = iteration / 10
        if (1 - done) * leniency[0] + done * leniency[1] == 0:
            strict = DFDLoss(lenient_on="none")(level)
            torch.testing.assert_close(loss, strict, rtol=1e-6, atol=0)
    assert not list(DFDLoss(lenient="context", leniency=0, channels=4).parameters())

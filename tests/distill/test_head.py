import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from dfd import DFDHead, UserError
from dfd.losses import DFDLoss, FeatureCriterion

STUDENT = {"p3": ShapeSpec(channels=4, stride=8), "p4": ShapeSpec(channels=4, stride=16)}
TEACHER = {"c3": ShapeSpec(channels=6, stride=8), "c4": ShapeSpec(channels=4, stride=16)}
SIZES = [(32, 32)]


def pyramids(seed=0, pad=0):
    generator = torch.Generator().manual_seed(seed)
    student = {
        "p3": torch.randn(1, 4, 4, 4, generator=generator),
        "p4": torch.randn(1, 4, 2, 2, generator=generator),
    }
    teacher = {
        "c3": torch.randn(1, 6, 4, 4, generator=generator),
        "c4": torch.randn(1, 4, 2, 2, generator=generator),
    }
    if pad:
        student = {k: nn.functional.pad(v, (0, pad, 0, pad), value=9.0) for k, v in student.items()}
        teacher = {k: nn.functional.pad(v, (0, pad), value=-9.0) for k, v in teacher.items()}
    return student, teacher


def make_head(seed=0, **kwargs):
    torch.manual_seed(seed)
    head = DFDHead(criterion=kwargs.pop("criterion", DFDLoss()), **kwargs)
    head.attach(STUDENT, TEACHER)
    return head


class Counting(FeatureCriterion):
    """Costs 1 a level and keeps what it was given; it takes the fields of a level themselves."""

    def forward(self, student, teacher, valid=None, boxes=None, stride=1):
        self.seen = (student, teacher, valid, boxes, stride)
        # A matrix product would follow autocast.
        self.dtype = (student.flatten(1) @ student.flatten(1).T).dtype
        return student.sum() * 0 + 1


class Seeing(FeatureCriterion):
    """Keeps the level that it was given."""

    def forward(self, level):
        self.seen = level
        return level.student.sum() * 0


def test_losses_carry_the_students_level_names():
    assert set(make_head()(*pyramids(), SIZES)) == {"loss_dfd_p3", "loss_dfd_p4"}


@pytest.mark.parametrize(
    ("level_weights", "expected"),
    [
        ("equal", {"p3": 1.0, "p4": 1.0}),
        ("cells", {"p3": 2 * 16 / 20, "p4": 2 * 4 / 20}),
        ({"p3": 0.0, "p4": 5.0}, {"p3": 0.0, "p4": 5.0}),
    ],
)
def test_level_weights(level_weights, expected):
    losses = make_head(criterion=Counting(), level_weights=level_weights)(*pyramids(), SIZES)
    assert {k.removeprefix("loss_dfd_"): v.item() for k, v in losses.items()} == pytest.approx(
        expected
    )


@pytest.mark.parametrize("level_weights", ["cells", "equal"])
def test_batch_without_a_real_cell_costs_nothing(level_weights):
    """A mosaic's seams and fill may leave none, on any level."""
    head = make_head(level_weights=level_weights)
    student, teacher = pyramids()
    student["p3"].requires_grad_()
    losses = head(student, teacher, SIZES, masks=[torch.zeros(SIZES[0], dtype=torch.bool)])
    assert {loss.item() for loss in losses.values()} == {0.0}
    sum(losses.values()).backward()
    assert not student["p3"].grad.any()


def test_warmup_and_end():
    head = make_head(criterion=Counting(), weight=3.0, warmup_iters=4, end_iter=10)
    assert [head.factor(i) for i in (0, 1, 3, 9, 10)] == [0.75, 1.5, 3.0, 3.0, 0.0]
    assert head(*pyramids(), SIZES, iteration=1)["loss_dfd_p4"].item() == pytest.approx(1.5 * 0.4)


def test_padding_is_never_distilled():
    head = make_head()
    plain, padded = head(*pyramids(), SIZES), head(*pyramids(pad=3), SIZES)
    for key, loss in plain.items():
        torch.testing.assert_close(padded[key], loss)


def test_padding_is_never_distilled_beside_a_larger_image():
    """Which the crop to the largest image leaves in."""
    head, sizes = make_head(), [(32, 32), (16, 24)]
    whole, other = (
        [{k: v.repeat(2, 1, 1, 1) for k, v in pyramid.items()} for pyramid in pyramids(seed)]
        for seed in (0, 1)
    )
    for pyramid, elsewhere in zip(other, whole, strict=True):
        for key, features in pyramid.items():
            rows, columns = (2, 3) if key.endswith("3") else (1, 2)
            features[0] = elsewhere[key][0]
            features[1, :, :rows, :columns] = elsewhere[key][1, :, :rows, :columns]
    assert not torch.equal(whole[0]["p3"], other[0]["p3"])
    losses = head(*other, sizes)
    for key, loss in head(*whole, sizes).items():
        torch.testing.assert_close(losses[key], loss)


@pytest.mark.parametrize("other", [2.0, "wide", ["level"], torch.ones(2), lambda: 0])
def test_what_a_criterion_calls_scale_or_measure_may_be_anything(other):
    def maps(**attributes):
        criterion = Counting()
        vars(criterion).update(attributes)
        return make_head(criterion=criterion).disparity_maps(*pyramids(), SIZES)["p3"][0]

    assert maps(scale=other, measure=other).equal(maps())
    assert maps(scale=other, measure="cosine").equal(maps(measure="cosine"))
    assert not maps(scale="none").equal(maps())


def test_every_head_parameter_gets_a_gradient_in_every_step():
    head = make_head(criterion=DFDLoss(lenient="context"), warmup_iters=5, end_iter=10)
    for losses in (head(*pyramids(), SIZES, iteration=0), head.idle_losses()):
        head.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in head.parameters())


def test_each_level_has_parameters_of_its_own():
    head = make_head(criterion=DFDLoss(lenient="context"))
    ids = [id(p) for p in head.parameters()]
    # One 1x1 adapter (p3) and a generator of two convolutions on each of two levels.
    assert len(ids) == len(set(ids)) == 2 + 2 * 4


def test_half_precision_features_meet_fp32_arithmetic():
    head = make_head(criterion=Counting())
    student, teacher = pyramids()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = head(student, {k: v.bfloat16() for k, v in teacher.items()}, SIZES)
    assert head.criteria["p3"].seen[0].dtype == torch.float32
    assert head.criteria["p3"].seen[1].dtype == torch.float32
    assert head.criteria["p3"].dtype == torch.float32
    assert all(v.dtype == torch.float32 for v in losses.values())


def test_squares_of_large_bf16_features_do_not_lose_their_digits():
    sizes = {"p3": 4, "p4": 2}
    # Both are numbers of bf16, and the square of their distance is: its mean with that of 0 is not.
    teacher = {k: torch.full((1, 4, n, n), 256.0) for k, n in sizes.items()}
    student = {k: v + 34 for k, v in teacher.items()}
    for features in student.values():
        features[:, 0] += 2
    head = DFDHead(criterion=DFDLoss(weight=1.0, scale="none", lenient_on="none", average="all"))
    head.attach(STUDENT, STUDENT | {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = head(
            *({k: v.bfloat16() for k, v in features.items()} for features in (student, teacher)),
            SIZES,
        )
    expected = torch.tensor(2 * (36**2 + 3 * 34**2) / 4)
    torch.testing.assert_close(sum(losses.values()), expected, rtol=1e-6, atol=0)


def test_criterion_is_given_what_its_signature_says():
    head = make_head(criterion=Counting())
    student, teacher = ({k: v.repeat(2, 1, 1, 1) for k, v in p.items()} for p in pyramids())
    boxes = [torch.tensor([[0.0, 0, 8, 8]])] * 2
    head(student, teacher, [(32, 20), (9, 24)], boxes=boxes)
    student, teacher, valid, given, stride = head.criteria["p3"].seen
    assert student.shape == teacher.shape == (2, 6, 4, 3)
    assert valid.sum((1, 2)).tolist() == [4 * 3, 2 * 3]
    assert given is boxes
    assert stride == 8
    assert not teacher.requires_grad


@pytest.mark.parametrize("wanted", [True, False])
def test_boxes_go_to_the_device_if_the_criterion_looks_at_them(wanted):
    """To one without memory, torch's meta device."""
    criterion = Counting()
    criterion.needs_boxes = wanted
    boxes = [torch.tensor([[0.0, 0, 8, 8]]), torch.zeros(0, 4)]
    # Autocast, and so a whole forward, does not know that device.
    given = make_head(criterion=criterion)._wanted_boxes(boxes, torch.device("meta"))
    assert [b.shape for b in given] == [(1, 4), (0, 4)]
    assert all(b.is_meta == wanted for b in given)


@pytest.mark.parametrize("pooled", ["both", "teacher"])
def test_pool_compares_at_the_grid_of_the_patches(pooled):
    criterion = Seeing()
    head = make_head(criterion=criterion, pool=16, pooled=pooled)
    student, teacher = pyramids()
    # 24 x 32 pixels: three rows of cells on p3, so that the last block has one.
    head(student, teacher, [(24, 32)], iteration=7)
    fine, coarse = (head.criteria[name].seen for name in ("p3", "p4"))
    assert coarse.stride == 16 and torch.equal(coarse.teacher, teacher["c4"])
    means = torch.stack(
        [teacher["c3"][..., :2, :], teacher["c3"][..., 2:3, :].repeat(1, 1, 2, 1)], dim=2
    )
    means = means.unflatten(-1, (2, 2)).mean(dim=(3, 5))
    adapted = head.adapters["p3"](student["p3"])
    assert fine.iteration == 7
    if pooled == "both":
        assert fine.stride == 16
        torch.testing.assert_close(fine.teacher, means)
        torch.testing.assert_close(fine.student[..., 0, 1], adapted[..., :2, 2:].mean(dim=(2, 3)))
    else:
        assert fine.stride == 8
        torch.testing.assert_close(fine.student, adapted[..., :3, :])
        spread = means.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :3, :]
        torch.testing.assert_close(fine.teacher, spread)


@pytest.mark.parametrize("pooled", ["both", "teacher"])
def test_pooled_blocks_are_of_real_cells_alone(pooled):
    head = make_head(pool=16, pooled=pooled)
    student, teacher = pyramids()
    mask = torch.ones(32, 32, dtype=torch.bool)
    mask[:, 20:] = False  # Half of the last real block's columns of cells.
    loss = head(student, teacher, SIZES, masks=[mask])["loss_dfd_p3"]
    student["p3"][..., 2:] = float("nan")
    teacher["c3"][..., 2:] = float("inf")
    torch.testing.assert_close(head(student, teacher, SIZES, masks=[mask])["loss_dfd_p3"], loss)


def test_adapter_that_makes_another_map_is_refused():
    with pytest.raises(UserError, match=r"adapter makes \(1, .* on p3: it must make \(1, "):
        make_head(adapter=lambda i, o: nn.Conv2d(i, o, 3))(*pyramids(), SIZES)


@pytest.mark.parametrize(
    "settings",
    [
        dict(weight=-1),
        dict(warmup_iters=-1),
        dict(end_iter=-1),
        dict(level_weights="area"),
        dict(level_weights={"p3": 1.0}),
        dict(level_weights={"p3": 1.0, "p4": 1.0, "p9": 1.0}),
        dict(levels=["p7"]),
        dict(adapter="none"),
        dict(pool=8),
        dict(pool=12),
        dict(pool=0),
        dict(pool=2.5),
        dict(pool=16, pooled="student"),
    ],
)
def test_bad_setting_is_refused_in_one_line(settings):
    with pytest.raises(UserError) as error:
        make_head(**settings)
    assert "\n" not in str(error.value)

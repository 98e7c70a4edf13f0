"""What the heads of student and teacher predict, distilled beside the features or alone."""

import math

import pytest
import torch
import torch.nn.functional as F
import toys
from detectron2.utils.events import EventStorage
from reppoints_toys import small_detector

from dfd import DFDHead, DistilledDetector, FrozenTeacher, PredictionHead, UserError
from dfd.distill.head_outputs import read_head, run_head
from dfd.losses import (
    BoxMimicLoss,
    DFDLoss,
    ObjectnessLoss,
    PredictionLoss,
    PredictionMimicLoss,
)
from dfd.losses.predictions import Predictions
from dfd.modeling import YOLOX
from dfd.modeling.yolox.head import logit_of_product


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def bce(s, q):
    return -(q * math.log(sigmoid(s)) + (1 - q) * math.log(1 - sigmoid(s)))


# Two levels of one image, two logits a cell: two cells, and one.
STUDENT = [[[0.5, -1.0], [2.0, 0.0]], [[-0.3, 1.2]]]
TEACHER = [[[1.5, -2.0], [-1.0, 0.5]], [[0.7, -0.4]]]


def tensors(levels):
    return [torch.tensor(cells).T[None, :, None, :].contiguous() for cells in levels]


def of(levels):
    return list(map(Predictions, tensors(levels)))


def all_valid(levels):
    return [torch.ones(1, 1, len(cells), dtype=torch.bool) for cells in levels]


def test_mimicking_by_hand():
    """Computed cell by cell from the formula of CrossKD's KDQualityFocalLoss."""
    positives = sum(max(map(sigmoid, cell)) for cells in TEACHER for cell in cells)
    expected = [
        sum(
            abs(sigmoid(s) - sigmoid(t)) * bce(s, sigmoid(t))
            for ours, theirs in zip(own, other, strict=True)
            for s, t in zip(ours, theirs, strict=True)
        )
        / positives
        for own, other in zip(STUDENT, TEACHER, strict=True)
    ]
    assert positives > 1
    found = PredictionMimicLoss(weight=2.0)(of(STUDENT), of(TEACHER), all_valid(STUDENT))
    assert [2 * e for e in expected] == pytest.approx([f.item() for f in found])


@pytest.mark.parametrize(("beta", "expected"), [(1.0, 72.70016), (2.0, 37.405121)])
def test_mimicking_is_that_of_crosskd(beta, expected):
    """The sum that its own ``kd_quality_focal_loss`` gives for these logits, run by us."""
    generator = torch.Generator().manual_seed(11)
    student = torch.randn(40, 6, generator=generator).T[None, :, None]
    teacher = 2 * torch.randn(40, 6, generator=generator).T[None, :, None]
    valid = torch.ones(1, 1, 40, dtype=torch.bool)
    loss = PredictionMimicLoss(beta=beta)
    (found,) = loss([Predictions(student)], [Predictions(teacher)], [valid])
    positives = teacher.sigmoid().amax(dim=1).sum()
    assert (found * positives).item() == pytest.approx(expected, rel=1e-5)


def test_objectness_by_hand():
    """G2SD's: the mean over logits of a level, weighed by the teacher's largest score at a cell."""
    expected = []
    for own, other in zip(STUDENT, TEACHER, strict=True):
        above = below = 0.0
        for ours, theirs in zip(own, other, strict=True):
            m = max(map(sigmoid, theirs))
            above += m * sum(bce(s, sigmoid(t)) for s, t in zip(ours, theirs, strict=True))
            below += m * len(ours)
        expected.append(0.1 * above / below)
    found = ObjectnessLoss()(of(STUDENT), of(TEACHER), all_valid(STUDENT))
    assert expected == pytest.approx([f.item() for f in found])


def boxes(seed, cells=30):
    generator = torch.Generator().manual_seed(seed)
    corner, size = (torch.rand(cells, 2, generator=generator) for _ in range(2))
    return torch.cat([40 * corner, 40 * corner + 1 + 20 * size], dim=1).T[None, :, None]


def test_boxes_are_those_of_crosskd():
    """What its own bbox_overlaps gives, "giou", weighed and summed as it does, run by us."""
    generator = torch.Generator().manual_seed(11)

    def draw():
        corner = 40 * torch.rand(30, 2, generator=generator)
        return torch.cat([corner, corner + 1 + 20 * torch.rand(30, 2, generator=generator)], dim=1)

    student, teacher = (draw().T[None, :, None] for _ in range(2))
    logits = 2 * torch.randn(30, 4, generator=generator).T[None, :, None]
    (found,) = BoxMimicLoss(weight=3.0)(
        [Predictions(torch.zeros_like(logits), student)],
        [Predictions(logits, teacher)],
        [torch.ones(1, 1, 30, dtype=torch.bool)],
    )
    sure = logits.sigmoid().amax(dim=1).sum()
    assert (found * sure / 3).item() == pytest.approx(34.376602, rel=1e-5)


def with_boxes(levels, seed):
    return [
        Predictions(x, boxes(seed + i, x.shape[-1]).repeat(1, x.shape[1], 1, 1))
        for i, x in enumerate(tensors(levels))
    ]


@pytest.mark.parametrize("loss", [PredictionMimicLoss(), ObjectnessLoss(), BoxMimicLoss()])
def test_padding_is_never_distilled(loss):
    ours, theirs = with_boxes(STUDENT, 1), with_boxes(TEACHER, 5)
    small = loss(ours, theirs, all_valid(STUDENT))
    assert all(x > 0 for x in small)
    ours, theirs = ([[F.pad(x, (0, 2)) for x in y] for y in side] for side in (ours, theirs))
    valid = [F.pad(v, (0, 2)) for v in all_valid(STUDENT)]
    for x in (x for side in (ours, theirs) for level in side for x in level):
        x[..., -2:] = float("nan")
    ours = [Predictions(*(x.requires_grad_() for x in level)) for level in ours]
    padded = loss(ours, [Predictions(*level) for level in theirs], valid)
    torch.testing.assert_close(padded, small)
    sum(padded).backward()
    grads = [x.grad for level in ours for x in level if x.grad is not None]
    assert grads and all(g.isfinite().all() and not g[..., -2:].any() for g in grads)
    blank = [torch.zeros_like(v) for v in valid]
    nothing = loss(ours, [Predictions(*level) for level in theirs], blank)
    assert [x.item() for x in nothing] == [0.0, 0.0]


BUILD = {
    **{kind: lambda seed, kind=kind: toys.build(kind, seed=seed) for kind in toys.CONFIGS},
    "reppoints": lambda seed: small_detector(),
    "yolox": lambda seed: _yolox(seed),
}
KINDS = ["faster_rcnn", "cascade_rcnn", "retinanet", "fcos", "reppoints", "yolox"]
BOTH = [PredictionMimicLoss(), BoxMimicLoss()]  # CrossKD's two.


def _yolox(seed):
    torch.manual_seed(seed)
    return YOLOX(depth=0.33, width=0.125, num_classes=3)


def detector(kind="retinanet", loss=None, teacher=None, check_classes=True, weight=1.0, **settings):
    frozen = FrozenTeacher(
        model=BUILD[teacher or kind](1), allow_random=True, precision="fp32",
        check_classes=check_classes,
    )
    return DistilledDetector(
        student=BUILD[kind](0),
        teacher=frozen,
        head=DFDHead(criterion=DFDLoss(), weight=weight),
        predictions=PredictionHead(loss=loss or PredictionMimicLoss(), **settings),
    ).train()


def step(model, iteration=0):
    torch.manual_seed(3)
    with EventStorage(iteration) as storage:
        losses = model(toys.make_batch())
        sum(losses.values()).backward()
        model.log.write()
    return losses, {k: v for k, (v, _) in storage.latest().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", [PredictionMimicLoss(), BoxMimicLoss(), BOTH])
@pytest.mark.parametrize("alone", [True, False])
def test_every_kind_of_head_learns_from_one_of_its_kind(kind, loss, alone):
    model = detector(kind, loss, weight=0.0 if alone else 1.0)
    losses, logged = step(model)
    names = {k for k in losses if k.startswith("loss_dfd_head_")}
    assert len(names) >= (3 if kind == "yolox" else 4) and all(losses[n] > 0 for n in names)
    features = {k for k in losses if k.startswith("loss_dfd_p")}
    assert not features if alone else features
    assert all(f"dfd/{n.removeprefix('loss_dfd_')}/ratio" in logged for n in names)
    head = model.student.proposal_generator if "rcnn" in kind else model.student.head
    assert any(p.grad is not None and p.grad.any() for p in head.parameters())
    assert all(p.grad is None for p in model.teacher.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_the_detector_finds(kind):
    """The best detection of an image is a box and a score of the head's predictions."""
    model = BUILD[kind](1).eval()
    batch = toys.make_batch()[:1]
    with torch.no_grad():
        image = model.preprocess_image(batch).tensor
        pyramid = model.backbone(image)
        levels = read_head(model, run_head(model, pyramid), boxes=True)
        if "rcnn" in kind:
            images = model.preprocess_image(batch)
            found = model.proposal_generator(images, pyramid)[0][0]
            best, scores = found.proposal_boxes.tensor[0], found.objectness_logits
            score = scores[0].item()
        else:
            for name in ("score_thresh", "test_score_thresh"):
                if hasattr(model, name):
                    setattr(model, name, 0.0)
            found = model([{"image": batch[0]["image"]}])[0]["instances"]
            best, score = found.pred_boxes.tensor[0], found.scores[0].item()
    height, width = batch[0]["image"].shape[-2:]
    rows = []
    for level in levels.values():
        anchors = level.boxes.shape[1] // 4
        logits = level.logits.unflatten(1, (anchors, -1)).amax(dim=2).flatten()
        corners = level.boxes.unflatten(1, (anchors, 4)).movedim(2, -1).reshape(-1, 4)
        rows.append(torch.cat([corners, logits[:, None]], dim=1))
    rows = torch.cat(rows)
    limits = torch.tensor([width, height, width, height])
    inside = torch.minimum(rows[:, :4].clamp(min=0), limits)
    distance = (inside - best).abs().amax(dim=1)
    assert distance.min() < 0.02
    # FCOS ranks by the score times centreness, which is no part of what is compared.
    if kind != "fcos":
        own = rows[distance < 0.02, 4]
        own = own if "rcnn" in kind else own.sigmoid()
        assert (own - score).abs().min() < 1e-4


def test_the_logit_of_a_product_is_exact_at_both_ends():
    a = torch.tensor([-90.0, -3.0, 0.0, 5.0, 40.0], requires_grad=True)
    b = torch.tensor([-90.0, 1.0, 0.0, 9.0, 40.0])
    found = logit_of_product(a, b)
    score = a.double().sigmoid() * b.double().sigmoid()
    torch.testing.assert_close(
        found[:4].double(), torch.logit(score)[:4], rtol=1e-4, atol=0, check_dtype=False
    )
    assert found.isfinite().all() and found[4] > 15
    (grad,) = torch.autograd.grad(found.sum(), a)
    assert grad.isfinite().all() and (grad[:4] > 0).all()


def test_a_side_of_yolox_that_nothing_holds_stays_finite():
    model = _yolox(0)
    predictions, grid = model.head(model.backbone(torch.zeros(1, 3, 64, 64)))
    raw = torch.full_like(predictions.regression, 200.0).requires_grad_()
    levels = model.read_head((predictions._replace(regression=raw), grid), boxes=True)
    assert all(boxes.isfinite().all() for _, boxes in levels)
    (grad,) = torch.autograd.grad(sum(boxes.sum() for _, boxes in levels), raw)
    assert grad.isfinite().all()


def test_the_stems_of_yolox_may_be_what_is_distilled():
    model = detector("yolox", BOTH)
    plain = model.teacher.predictions(model.teacher.model.backbone(torch.zeros(1, 3, 64, 64)))
    stems = model.teacher.model.head.stems(model.teacher.model.backbone(torch.zeros(1, 3, 64, 64)))
    again = model.teacher.predictions(stems, stems=True)
    assert all(torch.equal(plain[k].logits, again[k].logits) for k in plain)


def test_several_losses_are_added():
    found = [step(detector("retinanet", loss, weight=0.0))[0] for loss in (*BOTH, BOTH)]
    one, other, both = (losses["loss_dfd_head_p3"] for losses in found)
    assert both.item() == pytest.approx((one + other).item())


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet", "yolox"])
def test_a_student_that_predicts_as_its_teacher_has_nothing_to_learn(kind):
    model = detector(kind, [PredictionMimicLoss(), BoxMimicLoss()], weight=0.0)
    model.teacher.model.load_state_dict(model.student.state_dict())
    for module in model.student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    losses, _ = step(model)
    assert all(v < 1e-4 for k, v in losses.items() if k.startswith("loss_dfd_head_"))


def test_warm_up_end_and_weight():
    head = PredictionHead(loss=ObjectnessLoss(), weight=2.0, warmup_iters=4, end_iter=8)
    assert [head.factor(i) for i in (0, 1, 3, 7, 8)] == [0.5, 1.0, 2.0, 2.0, 0.0]
    ended = detector("faster_rcnn", weight=0.0, end_iter=0)
    losses, _ = step(ended)
    assert not any(k.startswith("loss_dfd") for k in losses)


def test_images_without_labels_are_left_to_the_features():
    model = detector("faster_rcnn")
    others = [{**item, "unlabelled": True} for item in toys.make_batch(seed=4)]
    for item in others:
        del item["instances"]
    with EventStorage(0):
        losses = model(toys.make_batch() + others)
    assert losses["loss_dfd_unlabelled_p3"] > 0 and losses["loss_dfd_head_p3"] > 0


class Learnt(PredictionLoss):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: detector("retinanet", teacher="faster_rcnn"), "head is a RetinaNetHead, the"),
        (lambda: detector("retinanet", check_classes=False), "may be of other classes"),
        (lambda: PredictionHead(loss=DFDLoss()), "loss is a DFDLoss: derive it"),
        (lambda: PredictionHead(loss=Learnt()), "has parameters or buffers, which no"),
        (lambda: PredictionHead(loss=[ObjectnessLoss(), "boxes"]), "loss is a str: derive it"),
        (lambda: PredictionHead(loss=[]), "model.predictions.loss is empty"),
        (lambda: BoxMimicLoss(weight=-1), "weight is -1"),
        (lambda: PredictionHead(loss=ObjectnessLoss(), weight=-1), "model.predictions.weight"),
        (lambda: PredictionHead(loss=ObjectnessLoss(), end_iter=-1), "model.predictions.end_iter"),
        (lambda: PredictionMimicLoss(beta="much"), "beta is 'much'"),
        (lambda: ObjectnessLoss(weight=-1), "weight is -1"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


class Unknown(torch.nn.Module):
    """A detector whose head is of no known kind."""


def test_a_head_of_no_known_kind_is_refused():
    with pytest.raises(UserError, match="the student, a Unknown, has no head that is known"):
        PredictionHead(loss=ObjectnessLoss()).attach(Unknown(), Unknown())


def test_other_anchors_are_refused():
    def more(seed):
        model = toys.build("retinanet", seed=seed)
        logits = model.head.cls_score
        model.head.cls_score = torch.nn.Conv2d(logits.in_channels, 6, 3, padding=1)
        return model

    BUILD["more"] = more
    try:
        model = detector("retinanet", teacher="more")
        with pytest.raises(UserError, match="27 logits a cell on p3, the teacher 6"):
            step(model)
    finally:
        del BUILD["more"]


@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn"])
def test_anchors_of_another_size_are_refused(kind):
    """As many of them as the student's, so that shapes would fit."""

    def wider(seed):
        model = toys.build(kind, seed=seed)
        owner = model.proposal_generator if kind == "faster_rcnn" else model
        list(owner.anchor_generator.cell_anchors)[1].mul_(2)
        return model

    BUILD["wider"] = wider
    try:
        with pytest.raises(UserError, match="other anchors than the student's"):
            detector(kind, teacher="wider")
    finally:
        del BUILD["wider"]


def test_objectness_is_of_no_class():
    losses, _ = step(detector("faster_rcnn", loss=ObjectnessLoss(), check_classes=False))
    assert losses["loss_dfd_head_p3"] > 0

"""What the heads of student and teacher predict, distilled beside the features or alone."""

import math

import pytest
import torch
import torch.nn.functional as F
import toys
from detectron2.utils.events import EventStorage
from reppoints_toys import small_detector

from dfd import DFDHead, DistilledDetector, FrozenTeacher, PredictionHead, UserError
from dfd.losses import DFDLoss, ObjectnessLoss, PredictionLoss, PredictionMimicLoss
from dfd.modeling import YOLOX


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def bce(s, q):
    return -(q * math.log(sigmoid(s)) + (1 - q) * math.log(1 - sigmoid(s)))


# Two levels of one image, two logits a cell: two cells, and one.
STUDENT = [[[0.5, -1.0], [2.0, 0.0]], [[-0.3, 1.2]]]
TEACHER = [[[1.5, -2.0], [-1.0, 0.5]], [[0.7, -0.4]]]


def tensors(levels):
    return [torch.tensor(cells).T[None, :, None, :].contiguous() for cells in levels]


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
    found = PredictionMimicLoss(weight=2.0)(tensors(STUDENT), tensors(TEACHER), all_valid(STUDENT))
    assert [2 * e for e in expected] == pytest.approx([f.item() for f in found])


@pytest.mark.parametrize(("beta", "expected"), [(1.0, 72.70016), (2.0, 37.405121)])
def test_mimicking_is_that_of_crosskd(beta, expected):
    """The sum that its own ``kd_quality_focal_loss`` gives for these logits, run by us."""
    generator = torch.Generator().manual_seed(11)
    student = torch.randn(40, 6, generator=generator).T[None, :, None]
    teacher = 2 * torch.randn(40, 6, generator=generator).T[None, :, None]
    valid = torch.ones(1, 1, 40, dtype=torch.bool)
    (found,) = PredictionMimicLoss(beta=beta)([student], [teacher], [valid])
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
    found = ObjectnessLoss()(tensors(STUDENT), tensors(TEACHER), all_valid(STUDENT))
    assert expected == pytest.approx([f.item() for f in found])


@pytest.mark.parametrize("loss", [PredictionMimicLoss(), ObjectnessLoss()])
def test_padding_is_never_distilled(loss):
    small = loss(tensors(STUDENT), tensors(TEACHER), all_valid(STUDENT))
    ours, theirs = ([F.pad(x, (0, 2)) for x in tensors(v)] for v in (STUDENT, TEACHER))
    valid = [F.pad(v, (0, 2)) for v in all_valid(STUDENT)]
    for x in (*ours, *theirs):
        x[..., -2:] = float("nan")
    ours = [x.requires_grad_() for x in ours]
    padded = loss(ours, theirs, valid)
    torch.testing.assert_close(padded, small)
    sum(padded).backward()
    assert all(x.grad.isfinite().all() and not x.grad[..., -2:].any() for x in ours)
    nothing = loss(tensors(STUDENT), tensors(TEACHER), [~v for v in all_valid(STUDENT)])
    assert [x.item() for x in nothing] == [0.0, 0.0]


BUILD = {
    **{kind: lambda seed, kind=kind: toys.build(kind, seed=seed) for kind in toys.CONFIGS},
    "reppoints": lambda seed: small_detector(),
}


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
        model.log_pending()
    return losses, {k: v for k, (v, _) in storage.latest().items()}


@pytest.mark.parametrize("kind", ["faster_rcnn", "cascade_rcnn", "retinanet", "fcos", "reppoints"])
@pytest.mark.parametrize("alone", [True, False])
def test_every_kind_of_head_learns_from_one_of_its_kind(kind, alone):
    model = detector(kind, weight=0.0 if alone else 1.0)
    losses, logged = step(model)
    names = {k for k in losses if k.startswith("loss_dfd_head_")}
    assert len(names) >= 4 and all(losses[n] > 0 for n in names)
    features = {k for k in losses if k.startswith("loss_dfd_p")}
    assert not features if alone else features
    assert all(f"dfd/{n.removeprefix('loss_dfd_')}/ratio" in logged for n in names)
    head = model.student.proposal_generator if "rcnn" in kind else model.student.head
    assert any(p.grad is not None and p.grad.any() for p in head.parameters())
    assert all(p.grad is None for p in model.teacher.model.parameters())


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_a_student_that_predicts_as_its_teacher_has_nothing_to_learn(kind):
    model = detector(kind, weight=0.0)
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
        (lambda: PredictionHead(loss=Learnt()), "has parameters, which no"),
        (lambda: PredictionHead(loss=ObjectnessLoss(), weight=-1), "model.predictions.weight"),
        (lambda: PredictionHead(loss=ObjectnessLoss(), end_iter=-1), "model.predictions.end_iter"),
        (lambda: PredictionMimicLoss(beta="much"), "beta='much'"),
        (lambda: ObjectnessLoss(weight=-1), "weight=-1"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_head_of_no_known_kind_is_refused(monkeypatch):
    monkeypatch.setitem(BUILD, "yolox", lambda s: YOLOX(depth=0.33, width=0.125, num_classes=3))
    with pytest.raises(UserError, match="the student, a YOLOX, has no head that is known"):
        detector("yolox")


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

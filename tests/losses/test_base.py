"""How criteria are called: with one level, or with its fields."""

import dataclasses

import pytest
import torch

from dfd import DFDHead, UserError
from dfd.losses import (
    CWDLoss,
    DFDLoss,
    FeatureCriterion,
    FGDLoss,
    G2SDLoss,
    LevelFeatures,
    MGDLoss,
    MimicLoss,
    PKDLoss,
)
from dfd.losses.base import check_criterion

CRITERIA = [
    DFDLoss(),
    CWDLoss(),
    FGDLoss(channels=4),
    G2SDLoss(weight=1.0),
    MGDLoss(channels=4),
    MimicLoss(),
    PKDLoss(),
]


def level(**changes):
    torch.manual_seed(0)
    features = LevelFeatures(
        student=torch.randn(2, 4, 6, 5, requires_grad=True),
        teacher=torch.randn(2, 4, 6, 5, requires_grad=True),
        valid=torch.rand(2, 6, 5) > 0.3,
        boxes=[torch.tensor([[0.0, 4.0, 20.0, 30.0]]), torch.zeros(0, 4)],
        stride=8,
        objectness=torch.rand(2, 6, 5),
    )
    return dataclasses.replace(features, **changes)


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: type(c).__name__)
def test_a_level_and_its_fields_give_the_same_loss(criterion):
    given = level()
    fields = (given.student, given.teacher, given.valid, given.boxes, given.stride)
    torch.manual_seed(1)
    one = criterion(given)
    torch.manual_seed(1)
    assert torch.equal(one, criterion(*fields, objectness=given.objectness))
    assert one > 0
    torch.manual_seed(1)
    named = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
    assert torch.equal(one, criterion(**named))


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: type(c).__name__)
def test_no_gradient_reaches_the_teacher(criterion):
    teacher = torch.randn(2, 4, 6, 5, requires_grad=True)
    criterion(level(teacher=teacher)).backward()
    assert teacher.grad is None


def test_a_level_may_come_with_settings_of_its_own():
    class Optional(FeatureCriterion):
        def forward(self, level, scale=2.0):
            return scale * level.student.sum()

    given = level()
    assert torch.equal(Optional()(given), 2 * given.student.sum())
    check_criterion(Optional())


class OldChild(DFDLoss):
    def forward(self, student, teacher, valid=None, boxes=None, stride=1):
        return 2 * super().forward(student, teacher, valid, boxes, stride)


class TwoArguments(FeatureCriterion):
    def forward(self, student, teacher):
        return (student - teacher).abs().mean()


class NoObjectness(FeatureCriterion):
    needs_objectness = True

    def forward(self, student, teacher, valid, boxes, stride):
        return student.sum()


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (torch.nn.MSELoss(), "model.head.criterion is a MSELoss: derive it from dfd.losses"),
        (OldChild(), "OldChild.forward takes student, .* that of DFDLoss, .* takes a level"),
        (TwoArguments(), "TwoArguments.forward cannot be given student, .* define forward"),
        (NoObjectness(), "NoObjectness.forward cannot be given .* and objectness="),
    ],
)
def test_what_cannot_be_called_is_told_when_the_head_is_made(criterion, message):
    with pytest.raises(UserError, match=message):
        DFDHead(criterion=criterion)


def test_a_criterion_may_take_all_fields_as_they_come():
    class Any(FeatureCriterion):
        def forward(self, *fields):
            student, teacher, *_ = fields
            return (student - teacher).abs().mean()

    check_criterion(Any())
    assert Any()(level()) > 0


def test_a_criterion_may_take_the_fields_themselves():
    class Fields(FeatureCriterion):
        needs_objectness = True

        def forward(self, student, teacher, valid, boxes, stride, *, objectness):
            self.seen = (student, teacher, valid, boxes, stride, objectness)
            return student.sum()

    given, criterion = level(), Fields()
    criterion(given)
    fields = [f for f in dataclasses.fields(given) if f.name not in ("iteration", "max_iter")]
    assert all(a is getattr(given, f.name) for a, f in zip(criterion.seen, fields, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": torch.zeros(1, 4, 6, 5)}, "student and teacher must be"),
        ({"student": torch.zeros(4, 6, 5)}, "student and teacher must be"),
        ({"valid": torch.ones(2, 6, 5)}, "valid must be bool"),
        ({"valid": torch.ones(2, 1, 5, dtype=torch.bool)}, "valid must be bool"),
        ({"objectness": torch.ones(2, 1, 5)}, "objectness must be"),
    ],
)
def test_shapes_that_would_broadcast_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        level(**changes)


def test_missing_objectness_is_told():
    with pytest.raises(ValueError, match="G2SDLoss needs objectness"):
        G2SDLoss()(level(objectness=None))

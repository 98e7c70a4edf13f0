"""The baselines against values that their authors' code computed, and where they deviate from it.

golden/*.npz hold ``student``, ``teacher`` (N,C,H,W), ``stride`` and ``boxes_i`` of image i; the
.json beside each the loss of each criterion and the norm of its gradient.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dfd import UserError
from dfd.losses import CWDLoss, FGDLoss, G2SDLoss, MGDLoss, MimicLoss, PKDLoss
from dfd.losses.fgd import GlobalContext, box_masks

GOLDEN = Path(__file__).parent / "golden"


def constant_mgd(channels):
    """Nothing hidden, every parameter of the generator 0.01."""
    criterion = MGDLoss(channels=channels, alpha_mgd=2e-5, lambda_mgd=0.0)
    for parameter in criterion.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    return criterion


GOLDEN_CRITERIA = {
    "pkd_w6": lambda channels: PKDLoss(weight=6),
    "cwd_tau1_w10": lambda channels: CWDLoss(tau=1, weight=10),
    "cwd_tau4_w10": lambda channels: CWDLoss(tau=4, weight=10),
    "fgd_retinanet_zero_relation": lambda channels: FGDLoss(channels=channels),
    "mgd_nomask_const_generator_0.01": constant_mgd,
}

# Each as a user would make it, but that MGD hides nothing, so that its value can be compared.
CRITERIA = {
    "mimic": MimicLoss,
    "cwd": CWDLoss,
    "pkd": PKDLoss,
    "mgd": partial(MGDLoss, channels=4, alpha_mgd=1e-2, lambda_mgd=0.0),
    # Relations at a weight at which they can be seen.
    "fgd": partial(FGDLoss, channels=4, lambda_fgd=1e-2),
    "g2sd": partial(G2SDLoss, weight=1.0),
}
BOXES = [torch.tensor([[3.0, 9.0, 17.0, 30.0], [20.0, 0.0, 44.0, 12.0]]), torch.zeros(0, 4)]


def make(name):
    torch.manual_seed(0)
    criterion = CRITERIA[name]()
    for parameter in criterion.parameters():
        # FGD's last layers are zero at first, which would hide what they do.
        torch.nn.init.normal_(parameter, std=0.3)
    return criterion


def pair(seed=0, shape=(2, 4, 5, 6)):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=generator).requires_grad_()
    return student, torch.randn(shape, generator=generator)


def call(criterion, student, teacher, valid=None):
    more = {}
    if criterion.needs_objectness:
        generator = torch.Generator().manual_seed(1)
        more["objectness"] = torch.rand(student[:, 0].shape, generator=generator)
        # The same in the corner that holds the image, whatever is padded.
        more["objectness"][:, :5, :6] = torch.linspace(0, 1, 30).view(5, 6)
    return criterion(student, teacher, valid, BOXES, 8, **more)


@pytest.mark.parametrize("all_valid", [False, True], ids=["no mask", "mask of ones"])
@pytest.mark.parametrize("name", GOLDEN_CRITERIA)
@pytest.mark.parametrize("case", ["levels_a", "levels_b"])
def test_value_and_gradient_of_the_authors_code(case, name, all_valid):
    data = np.load(GOLDEN / f"{case}.npz")
    expected = json.loads((GOLDEN / f"{case}.json").read_text())[name]
    student = torch.tensor(data["student"], requires_grad=True)
    boxes = [torch.tensor(data[f"boxes_{i}"]) for i in range(len(student))]
    valid = torch.ones(student[:, 0].shape, dtype=torch.bool) if all_valid else None
    criterion = GOLDEN_CRITERIA[name](student.shape[1])
    loss = criterion(student, torch.tensor(data["teacher"]), valid, boxes, int(data["stride"]))
    loss.backward()
    torch.testing.assert_close(loss.item(), expected["loss"], rtol=1e-4, atol=0)
    norm = student.grad.norm().item()
    torch.testing.assert_close(norm, expected["grad_norm_student"], rtol=1e-4, atol=0)


def test_mimic_by_hand():
    student, teacher = torch.zeros(1, 2, 1, 2), torch.tensor([1.0, 3, 0, 2]).view(1, 2, 1, 2)
    loss = MimicLoss(weight=2)(student, teacher)
    torch.testing.assert_close(loss, torch.tensor(2 * (1 + 9 + 0 + 4) / 4))
    valid = torch.tensor([True, False]).view(1, 1, 2)
    torch.testing.assert_close(MimicLoss()(student, teacher, valid), torch.tensor((1 + 0) / 2))


def test_g2sd_by_hand():
    """Squared distances 10 and 4 under objectness 0.5 and 0.25."""
    student, teacher = torch.zeros(1, 2, 1, 2), torch.tensor([1.0, 0, 3, 2]).view(1, 2, 1, 2)
    objectness = torch.tensor([0.5, 0.25]).view(1, 1, 2)
    loss = G2SDLoss(weight=2)(student, teacher, objectness=objectness)
    torch.testing.assert_close(loss, torch.tensor(2 * (0.5 * 10 + 0.25 * 4) / 0.75))


@pytest.mark.parametrize("name", CRITERIA)
def test_padding_is_never_distilled(name):
    criterion = make(name)
    student, teacher = (x.detach() for x in pair())
    small = call(criterion, student, teacher)
    torch.testing.assert_close(call(criterion, student, teacher, torch.ones(2, 5, 6).bool()), small)

    valid = torch.zeros(2, 8, 9, dtype=torch.bool)
    valid[:, :5, :6] = True
    padded = [torch.full((2, 4, 8, 9), 50.0 * i) for i in (1, -3)]
    for canvas, features in zip(padded, (student, teacher), strict=True):
        canvas[..., :5, :6] = features
    torch.testing.assert_close(call(criterion, *padded, valid), small)


@pytest.mark.parametrize("name", CRITERIA)
def test_no_valid_cell_gives_zero_and_a_finite_gradient(name):
    student, teacher = pair()
    loss = call(make(name), student, teacher, torch.zeros(2, 5, 6, dtype=torch.bool))
    loss.backward()
    torch.testing.assert_close(loss.item(), 0.0, atol=1e-6, rtol=0)
    torch.testing.assert_close(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("name", CRITERIA)
def test_gradient_reaches_student_and_parameters_and_never_the_teacher(name):
    criterion = make(name)
    student, teacher = pair()
    teacher.requires_grad_()
    call(criterion, student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in criterion.parameters())


@pytest.mark.parametrize("name", ["mimic", "cwd", "pkd", "g2sd", "fgd"])
def test_student_equal_to_teacher_costs_nothing(name):
    criterion = CRITERIA[name]()  # As initialised: FGD's relations begin at zero.
    teacher = pair()[1]
    torch.testing.assert_close(
        call(criterion, teacher.clone(), teacher).item(), 0.0, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("name", ["pkd"])
def test_pkd_forgives_scale_and_offset_of_a_channel(name):
    teacher = pair()[1]
    scale, offset = torch.tensor([3.0, 0.1, 1, 7]), torch.tensor([5.0, 0, -2, 1])
    student = teacher * scale.view(1, 4, 1, 1) + offset.view(1, 4, 1, 1)
    torch.testing.assert_close(make(name)(student, teacher).item(), 0.0, atol=1e-5, rtol=0)


def test_mgd_hides_its_share_of_cells_anew_each_time():
    """With an identity for a generator, a hidden cell costs |T|^2 and a seen one nothing."""
    criterion = MGDLoss(channels=1, alpha_mgd=1.0, lambda_mgd=0.65)
    for conv in (criterion.generator.conv1, criterion.generator.conv2):
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    torch.manual_seed(0)
    ones = torch.ones(1, 1, 100, 100)
    costs = [criterion(ones, ones).item() for _ in range(3)]
    assert all(abs(cost / 10_000 - 0.65) < 0.02 for cost in costs)
    assert len(set(costs)) == 3


def test_boxes_misplaced_on_a_padded_batch():
    """A box of cells 1 to 2 by 0 to 1 stays there, however many cells of padding follow."""
    boxes = [torch.tensor([[8.5, 0.0, 15.0, 7.0]])]
    for width in (4, 9):
        foreground, background = box_masks(boxes, 8, torch.zeros(1, 3, width), None)
        expected = torch.zeros(1, 3, width)
        expected[0, 0:2, 1:3] = 1 / 4
        torch.testing.assert_close(foreground, expected)
        torch.testing.assert_close(background, (expected == 0) / (3 * width - 4))


@pytest.mark.parametrize("padding", [50.0, -50.0])
def test_fgd_context_does_not_see_padding(padding):
    torch.manual_seed(0)
    context = GlobalContext(4)
    for parameter in context.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features = pair()[1]
    padded = torch.full((2, 4, 8, 9), padding)
    padded[..., :5, :6] = features
    valid = torch.zeros(2, 8, 9, dtype=torch.bool)
    valid[:, :5, :6] = True
    torch.testing.assert_close(context(padded, valid), context(features, None))


def test_fgd_overlapping_boxes_take_the_larger_weight_and_boxes_may_leave_the_map():
    boxes = [
        torch.tensor([[0.0, 0.0, 30.0, 30.0], [9.0, 9.0, 10.0, 10.0], [17.0, 17.0, 90.0, 23.0]])
    ]
    foreground, background = box_masks(boxes, 8, torch.zeros(1, 4, 4), None)
    large, small, outside = 1 / 25, 1 / 4, 1 / 22
    expected = torch.full((4, 4), large)
    expected[2:4, 2:4] = outside
    expected[1:3, 1:3] = small
    torch.testing.assert_close(foreground[0], expected)
    torch.testing.assert_close(background.sum(), torch.tensor(0.0))


def test_fgd_of_another_image_size_is_divided_by_the_area():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 4, 8, 12)
    plain = FGDLoss(channels=4)(student, teacher, stride=8)
    by_size = FGDLoss(channels=4, reference_size=32)(student, teacher, stride=8)
    torch.testing.assert_close(by_size, plain * (32 * 32) / (64 * 96))


@pytest.mark.parametrize(
    ("criterion", "settings", "named"),
    [
        (MimicLoss, dict(weight=-1), "weight is -1"),
        (PKDLoss, dict(weight=float("nan")), "weight is nan"),
        (CWDLoss, dict(tau=0), "tau is 0"),
        (CWDLoss, dict(weight=-2), "weight is -2"),
        (MGDLoss, dict(alpha_mgd=-1), "alpha_mgd is -1"),
        (MGDLoss, dict(lambda_mgd=1.0), "lambda_mgd is 1.0"),
        (FGDLoss, dict(temp=0), "temp is 0"),
        (FGDLoss, dict(gamma_fgd=-1), "gamma_fgd is -1"),
        (FGDLoss, dict(reference_size=0), "reference_size is 0"),
        (G2SDLoss, dict(weight=-1), "weight is -1"),
    ],
)
def test_bad_setting_is_named(criterion, settings, named):
    with pytest.raises(UserError) as error:
        criterion(**settings)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", CRITERIA)
def test_shapes_that_would_broadcast_are_refused(name):
    with pytest.raises(ValueError, match="one shape"):
        call(make(name), torch.zeros(2, 4, 5, 6), torch.zeros(2, 1, 5, 6))


@pytest.mark.parametrize("value", ["much", None, True, float("nan"), -1])
@pytest.mark.parametrize(
    ("criterion", "key"),
    [
        (MimicLoss, "weight"),
        (CWDLoss, "weight"),
        (CWDLoss, "tau"),
        (PKDLoss, "weight"),
        (MGDLoss, "alpha_mgd"),
        (MGDLoss, "lambda_mgd"),
        (FGDLoss, "temp"),
        (FGDLoss, "alpha_fgd"),
        (G2SDLoss, "weight"),
    ],
)
def test_what_is_no_number_in_its_range_is_named(criterion, key, value):
    with pytest.raises(UserError, match=f"{criterion.__name__}: {key} is "):
        criterion(**{key: value})

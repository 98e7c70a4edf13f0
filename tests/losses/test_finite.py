"""Losses and gradients are finite on degenerate features, and never come from outside the mask."""

import itertools
import math
import zlib

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from dfd import DFDHead
from dfd.distill.disparity import SCALES, SPLITS, channel_means, disparity_map, scale_features
from dfd.losses import CWDLoss, FGDLoss, G2SDLoss, MGDLoss, MimicLoss, PKDLoss
from dfd.losses.dfd import AVERAGES, LENIENT, DFDLoss, direction_cost

SHAPE = (2, 4, 6, 7)
BOXES = [torch.tensor([[3.0, 9.0, 17.0, 30.0], [20.0, 0.0, 44.0, 12.0]]), torch.zeros(0, 4)]
# Where features are real: of one image a corner, of the other a part that touches no border.
VALID = torch.zeros(SHAPE[0], *SHAPE[2:], dtype=torch.bool)
VALID[0, :5, :4] = VALID[1, 2:5, 1:6] = True

# Every scale with every lenient cost; the rest, which those do not meddle with, in turn.
REST = itertools.cycle(itertools.product(("squared", "cosine"), SPLITS, AVERAGES, (1.0, 0.5)))
DFD = {
    "-".join(map(str, options)): dict(
        zip(("scale", "lenient", "measure", "split", "average", "leniency"), options, strict=True)
    )
    for options in (
        (*pair, *rest)
        for pair in itertools.product(SCALES, LENIENT)
        for rest in itertools.islice(REST, 2)
    )
}
CRITERIA = {
    **{f"dfd-{name}": lambda s=s: DFDLoss(channels=4, **s) for name, s in DFD.items()},
    "dfd-low": lambda: DFDLoss(lenient_on="low"),
    "dfd-all": lambda: DFDLoss(lenient_on="all", num_regions=3, scale="none"),
    "dfd-strict": lambda: DFDLoss(lenient_on="none"),
    "dfd-certainty": lambda: DFDLoss(certainty=True),
    "mimic": MimicLoss,
    "cwd": CWDLoss,
    "cwd-4": lambda: CWDLoss(tau=4),
    "pkd": PKDLoss,
    "mgd": lambda: MGDLoss(channels=4, lambda_mgd=0.45),
    "fgd": lambda: FGDLoss(channels=4),
    "g2sd": G2SDLoss,
}


def noise(name):
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(SHAPE, generator=generator)


def spoilt(x, how):
    """Features with something degenerate in them."""
    x = x.clone()
    if how == "zero":
        x.zero_()
    elif how == "zero cells":
        x[:, :, 2:4, 1:3] = 0
    elif how == "zero channel":
        x[:, 1] = 0
    elif how == "constant":
        x.fill_(3.7)
    elif how == "constant channel":
        x[:, 2] = -1000.3
    elif how == "rectified":
        x.relu_()
    elif how == "tiny":
        x *= 1e-30
    elif how == "fp16 range":
        x = x.sign() * 65504
    elif how == "huge":
        x *= 1e18
    elif how == "huge cell":
        x[:, :, 3, 2] = -1e18
    else:
        assert how == "plain"
    return x


WAYS = (
    "plain", "zero", "zero cells", "zero channel", "constant", "constant channel", "rectified",
    "tiny", "fp16 range", "huge", "huge cell",
)  # fmt: skip
SPOILT = [(way, "plain") for way in WAYS] + [("plain", way) for way in WAYS[1:]]
SPOILT += [("zero", "zero"), ("zero", "huge"), ("huge", "zero"), ("constant", "constant")]
SPOILT += [("zero cells", "zero cells"), ("huge", "constant"), ("constant", "huge")]
SPOILT += [(way, "equal") for way in WAYS]


def call(criterion, student, teacher, valid, outside=None):
    more = {}
    if criterion.needs_objectness:
        more["objectness"] = noise("objectness")[:, 0].sigmoid()
        if outside is not None:
            more["objectness"] = torch.where(valid, more["objectness"], outside)
    torch.manual_seed(0)  # MGD draws.
    return criterion(student, teacher, valid, BOXES, 8, **more)


def make(name):
    torch.manual_seed(0)
    return CRITERIA[name]()


def loss_and_gradient(criterion, student, teacher, valid, outside=None):
    student = student.clone().requires_grad_()
    criterion.zero_grad()
    loss = call(criterion, student, teacher, valid, outside)
    loss.backward()
    parameters = {n: p.grad.clone() for n, p in criterion.named_parameters()}
    return loss.detach(), student.grad, parameters


@pytest.mark.slow
@pytest.mark.parametrize("name", CRITERIA)
def test_loss_and_gradient_are_finite_whatever_the_features(name):
    criterion = make(name)
    for (of_student, of_teacher), valid in itertools.product(SPOILT, (None, VALID)):
        student = spoilt(noise("student"), of_student)
        equal = of_teacher == "equal"
        teacher = student.clone() if equal else spoilt(noise("teacher"), of_teacher)
        loss, gradient, parameters = loss_and_gradient(criterion, student, teacher, valid)
        case = (of_student, of_teacher, valid is not None)
        assert loss.isfinite(), (case, loss)
        assert gradient.isfinite().all(), case
        assert all(g.isfinite().all() for g in parameters.values()), case
        assert all(value.isfinite() for value in criterion.stats.values()), case
        if valid is not None:
            assert not gradient.masked_select(~valid[:, None]).any(), case


@pytest.mark.parametrize("name", CRITERIA)
def test_what_lies_outside_the_mask_does_not_count(name):
    """Not even in the gradient, where 0 times inf is NaN."""
    criterion = make(name)
    student, teacher = noise("student"), noise("teacher")
    zero = [x.masked_fill(~VALID[:, None], 0) for x in (student, teacher)]
    expected = loss_and_gradient(criterion, *zero, VALID)
    assert expected[1].any()
    for a, b in itertools.product((math.inf, -math.inf, math.nan, 1e18, -1e18), repeat=2):
        outside = [x.masked_fill(~VALID[:, None], v) for x, v in ((student, a), (teacher, b))]
        ours = loss_and_gradient(criterion, *outside, VALID, outside=torch.tensor(b))
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)
        assert not ours[1].masked_select(~VALID[:, None]).any()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("outside", [math.inf, math.nan])
def test_scaled_features_and_disparity_inside_do_not_know_what_is_outside(scale, outside):
    maps = []
    for value in (0.0, outside):
        pair = [x.masked_fill(~VALID[:, None], value) for x in (noise("student"), noise("teacher"))]
        maps.append(disparity_map(*scale_features(*pair, VALID, scale)))
    torch.testing.assert_close(maps[1][VALID], maps[0][VALID])


def test_level_whose_teacher_is_constant_is_not_blown_up():
    """A constant has no spread to divide by; 1e-6 in its place made the loss 1e12."""
    for value in (0.0, 3.7, -1000.3):
        loss = DFDLoss(scale="level")(noise("student"), torch.full(SHAPE, value))
        assert loss < 10 * (1 + value**2)


def test_direction_alone_where_either_side_has_none():
    student = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]]).view(1, 2, 1, 3).requires_grad_()
    teacher = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 3.0]]).view(1, 2, 1, 3)
    cost = direction_cost(channel_means(student, teacher))
    torch.testing.assert_close(cost.flatten(), torch.tensor([0.0, 0.0, 10.0]))
    cost.sum().backward()
    assert student.grad.isfinite().all()


class SumOfSquares(nn.Module):
    """An adapter of two layers, whose second sees what the first puts on padding."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels), nn.ReLU()
        )

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("adapter", ["auto", "conv1x1", "conv3x3", SumOfSquares])
@pytest.mark.parametrize("scale", [1.0, 1.5, 0.5])
@pytest.mark.parametrize("criterion", [DFDLoss, G2SDLoss, FGDLoss], ids=lambda c: c.__name__)
@pytest.mark.parametrize("outside", [math.inf, 1e18])
def test_head_passes_nothing_of_the_padding_on(adapter, scale, criterion, outside):
    """Through adapters, whose kernels reach over the border, and through resampling."""
    sizes = [(40, 24), (24, 40)]
    generator = torch.Generator().manual_seed(0)
    cells = [round(6 * scale) for _ in range(2)]
    student = torch.randn(2, 4, 6, 6, generator=generator)
    teacher = torch.randn(2, 4, *cells, generator=generator)
    objectness = torch.rand(2, *cells, generator=generator)
    results = []
    for value in (0.0, outside):
        torch.manual_seed(0)
        head = DFDHead(criterion=criterion(), adapter=adapter, align="resize")
        shapes = {"p3": ShapeSpec(channels=4, stride=8)}
        head.attach(shapes, shapes, teacher_scale=scale)
        maps = [student.clone(), teacher.clone(), objectness[:, None].clone()]
        for features, factor in zip(maps, (1, scale, scale), strict=True):
            for image, (height, width) in zip(features, sizes, strict=True):
                rows, columns = (math.ceil(round(side * factor) / 8) for side in (height, width))
                image[:, rows:] = image[:, :, columns:] = value
        maps[0].requires_grad_()
        losses = head(
            {"p3": maps[0]}, {"p3": maps[1]}, sizes, objectness={"p3": maps[2][:, 0]},
            boxes=[b[:1] for b in BOXES],
        )  # fmt: skip
        losses["loss_dfd_p3"].backward()
        assert all(p.grad.isfinite().all() for p in head.parameters())
        results.append((losses["loss_dfd_p3"].detach(), maps[0].grad))
        assert all(d[v].isfinite().all() for d, v in head.disparity_maps(
            {"p3": maps[0]}, {"p3": maps[1]}, sizes
        ).values())  # fmt: skip
    torch.testing.assert_close(results[1], results[0])
    for gradient, (height, width) in zip(results[1][1], sizes, strict=True):
        assert not gradient[:, height // 8 :].any() and not gradient[:, :, width // 8 :].any()

"""Images without labels: they bring the distillation loss alone."""

import math

import pytest
import torch
import toys
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from vit_toys import timm_vit_config

from dfd import DFDHead, DistilledDetector, FrozenTeacher
from dfd.losses import DFDLoss, G2SDLoss


def detector(student="faster_rcnn", criterion=None, **head):
    if student == "vit":
        torch.manual_seed(0)
        built = instantiate(timm_vit_config(square_pad=96))
    else:
        built = toys.build(student)
    teacher = FrozenTeacher(model=toys.build(seed=1), allow_random=True, precision="fp32")
    head = DFDHead(criterion=criterion or DFDLoss(), adapter="conv1x1", **head)
    model = DistilledDetector(student=built, teacher=teacher, head=head).train()
    # Statistics of a batch would tie its images together.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


def without_labels(batch):
    batch = [{k: v for k, v in item.items() if k != "instances"} for item in batch]
    return [{**item, "unlabelled": True} for item in batch]


def step(model, batch, part="loss"):
    """Losses, the gradients of those whose names begin so, and what is logged."""
    model.zero_grad()
    torch.manual_seed(3)
    model.log.later = True
    with EventStorage(0) as storage:
        losses = model(batch)
        sum(v for k, v in losses.items() if k.startswith(part)).backward()
        model.log.write()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return losses, gradients, {k: v for k, (v, _) in storage.latest().items()}


LABELLED = toys.make_batch(sizes=((64, 96), (80, 64)))
OTHERS = without_labels(toys.make_batch(sizes=((72, 88), (50, 64), (90, 60)), seed=5))


@pytest.mark.parametrize("student", ["faster_rcnn", "retinanet", "vit"])
def test_they_bring_the_distillation_loss_and_nothing_else(student):
    # Each time anew, for RetinaNet's losses remember the batch before.
    plain, _, _ = step(detector(student, gradient_share=None), LABELLED)
    mixed, gradients, _ = step(detector(student, gradient_share=None), LABELLED + OTHERS)
    own = {k for k in plain if not k.startswith("loss_dfd")}
    assert {k: mixed[k].item() for k in own} == {k: plain[k].item() for k in own}
    # Every image counts as much as any other.
    for name in plain.keys() - own:
        torch.testing.assert_close(mixed[name], 2 / 5 * plain[name])
        level = name.removeprefix("loss_dfd_")
        assert mixed[f"loss_dfd_unlabelled_{level}"] > 0
    assert len(mixed) == len(own) + 2 * (len(plain) - len(own))
    # As labelled ones, alone: their loss is the same.
    with_labels = toys.make_batch(sizes=((72, 88), (50, 64), (90, 60)), seed=5)
    alone, _, _ = step(detector(student, gradient_share=None), with_labels)
    for name in plain.keys() - own:
        found = mixed["loss_dfd_unlabelled_" + name.removeprefix("loss_dfd_")]
        torch.testing.assert_close(found, 3 / 5 * alone[name])
    assert any(n.startswith("student.backbone") and g.any() for n, g in gradients.items())


def test_their_gradient_reaches_the_backbone_and_no_head():
    _, gradients, _ = step(
        detector(gradient_share=None), LABELLED + OTHERS, part="loss_dfd_unlabelled"
    )
    assert any(n.startswith("student.backbone") and g.any() for n, g in gradients.items())
    assert any(n.startswith("head.") and g.any() for n, g in gradients.items())
    _, mixed, _ = step(detector(gradient_share=None), LABELLED + OTHERS)
    _, alone, _ = step(detector(gradient_share=None), LABELLED)
    heads = [n for n in alone if n.startswith(("student.roi_heads", "student.proposal"))]
    assert len(heads) > 4
    for name in heads:
        torch.testing.assert_close(mixed[name], alone[name])


@pytest.mark.parametrize("over", ["all", "level"])
def test_the_limit_holds_for_the_distillation_of_both_together(over):
    """Else images without labels would be distilled without any limit."""
    settings = {"gradient_share": 1.0, "gradient_share_mode": "target", "gradient_share_over": over}
    _, _, logged = step(detector(**settings), LABELLED + OTHERS)
    free = detector(gradient_share=math.inf)
    _, _, measured = step(free, LABELLED + OTHERS)
    levels = [f"p{k}" for k in range(2, 7)]
    for level in levels:
        name = f"dfd/{level}/gradient_factor"
        assert logged[name] > 0 and logged[f"dfd/unlabelled_{level}/gradient_factor"] > 0
        # Beside the labels' gradient of their level; there is none of their own to be along.
        known = measured[f"dfd/{level}/gradient_ratio"] > 0
        assert (measured[f"dfd/unlabelled_{level}/gradient_ratio"] > 0) == known
        assert f"dfd/unlabelled_{level}/gradient_cosine" not in measured
    factors = {value for name, value in logged.items() if name.endswith("/gradient_factor")}
    if over == "all":
        (factor,) = factors
        # Of labels and distillation at the features, by the gradients without a limit.
        _, whole, _ = step(free, LABELLED + OTHERS)
        _, labels, _ = step(free, LABELLED + OTHERS, part="loss_dfd")
        _, found, _ = step(detector(**settings), LABELLED + OTHERS)
        name = "student.backbone.fpn_output2.weight"
        expected = whole[name] - labels[name] + factor * labels[name]
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("settings", [{"weight": 0.0}, {"end_iter": 0}])
def test_where_nothing_is_distilled_they_are_not_looked_at(settings):
    model = detector(**settings)
    alone, first, _ = step(model, LABELLED)
    mixed, second, _ = step(model, LABELLED + OTHERS)
    assert {k: v.item() for k, v in alone.items()} == {k: v.item() for k, v in mixed.items()}
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_criteria_that_ask_for_objectness_and_trunks_have_theirs():
    losses, _, _ = step(detector(criterion=G2SDLoss(weight=1.0)), LABELLED + OTHERS)
    assert losses["loss_dfd_unlabelled_p3"] > 0
    losses, _, logged = step(detector(trunk=True), LABELLED + OTHERS)
    assert losses["loss_dfd_unlabelled_res4"] > 0
    assert "dfd/unlabelled_res4/gradient_ratio" in logged


def test_evaluation_knows_no_difference():
    model = detector().eval()
    found = model(OTHERS)
    assert len(found) == 3

"""Distillation's gradient at the features, held to a share of the labels'."""

import math
import os

import pytest
import torch
import torch.distributed as dist
from commands import free_port
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from forked import SERVER
from own_toys import CONFIGS, build
from torch.multiprocessing import start_processes
from toys import make_batch
from vit_toys import timm_vit_config

from dfd import DFDHead, DistilledDetector, FrozenTeacher, UserError
from dfd.distill.gradient_share import GradientShare
from dfd.engine.trainer import Trainer
from dfd.losses import DFDLoss

# What the labels and the distillation give two levels.
LABELS = {"p2": torch.tensor([[3.0, 0.0]]), "p3": torch.tensor([[0.0, 4.0]])}
DISTILLED = {"p2": torch.tensor([[-6.0, 8.0]]), "p3": torch.tensor([[0.0, 24.0]])}


def gradients(share, labels=LABELS, distilled=DISTILLED, warmup=1.0):
    """What the features of two levels are given."""
    features = {name: torch.zeros(1, 2, requires_grad=True) for name in LABELS}
    # Not leaves, as a backbone's are not.
    own, theirs = share.split({name: 1.0 * f for name, f in features.items()}, warmup)
    loss = sum((own[name] * g).sum() for name, g in labels.items())
    loss = loss + sum((theirs[name] * g).sum() for name, g in distilled.items())
    loss.backward()
    return {name: f.grad for name, f in features.items()}


def sum_of(factor, labels=LABELS, distilled=DISTILLED):
    factor = factor if isinstance(factor, dict) else dict.fromkeys(labels, factor)
    return {name: labels[name] + factor[name] * distilled[name] for name in labels}


LENGTH, DISTILLED_LENGTH = 5.0, math.sqrt(36 + 64 + 576)


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"share": 1.0}, LENGTH / DISTILLED_LENGTH),
        ({"share": 0.5}, 0.5 * LENGTH / DISTILLED_LENGTH),
        ({"share": 100.0}, 1.0),
        ({"share": math.inf}, 1.0),
        ({"share": 100.0, "mode": "target"}, 100 * LENGTH / DISTILLED_LENGTH),
        ({"share": 0.5, "over": "level"}, {"p2": 0.15, "p3": 1 / 12}),
        ({"share": 2.0, "over": "level", "mode": "target"}, {"p2": 0.6, "p3": 1 / 3}),
    ],
)
def test_head_has_its_share_of_the_labels_gradient(settings, factor):
    torch.testing.assert_close(gradients(GradientShare(**settings)), sum_of(factor))


def test_part_against_the_labels_is_dropped():
    # On p2 alone the two point apart: of (-6, 8) against (3, 0) the first goes.
    share = GradientShare(math.inf, over="level", drop_conflict=True)
    expected = sum_of(1.0)
    expected["p2"] = torch.tensor([[3.0, 8.0]])
    torch.testing.assert_close(gradients(share), expected)
    # Over both they do not: -18 + 96.
    torch.testing.assert_close(gradients(GradientShare(math.inf, drop_conflict=True)), sum_of(1.0))
    # What is left is what the share is of.
    share = GradientShare(0.5, over="level", drop_conflict=True)
    assert gradients(share)["p2"].tolist() == [[3.0, pytest.approx(1.5)]]


def test_share_rises_with_the_warm_up():
    torch.testing.assert_close(
        gradients(GradientShare(1.0), warmup=0.25), sum_of(0.25 * LENGTH / DISTILLED_LENGTH)
    )


def test_without_one_side_there_is_nothing_to_hold_to():
    zero = {name: torch.zeros(1, 2) for name in LABELS}
    for empty in (zero, {}):
        assert gradients(GradientShare(0.1), labels=empty)["p2"].tolist() == [[-6.0, 8.0]]
        assert gradients(GradientShare(0.1), distilled=empty)["p2"].tolist() == [[3.0, 0.0]]


def test_level_that_the_labels_do_not_know_takes_the_factor_of_all():
    share = GradientShare(0.5, over="level")
    labels = {"p2": LABELS["p2"]}
    found = gradients(share, labels=labels)
    assert found["p3"].tolist() == [[0.0, pytest.approx(24 * 0.5 * 3 / DISTILLED_LENGTH)]]


def test_gradient_that_is_no_number_stays_one():
    """fp16's scale and the trainer's check wait for it."""
    for bad in (math.inf, math.nan):
        distilled = {**DISTILLED, "p2": torch.tensor([[bad, 0.0]])}
        assert not gradients(GradientShare(0.5), distilled=distilled)["p2"].isfinite().all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"gradient_share": 0.0}, "gradient_share is 0"),
        ({"gradient_share": -1.0}, "gradient_share is -1"),
        ({"gradient_share": math.nan}, "gradient_share is nan"),
        ({"gradient_share": ".inf"}, "gradient_share is '.inf'; it must be a number"),
        ({"gradient_share": True}, "gradient_share is True"),
        ({"gradient_share": math.inf, "gradient_share_mode": "target"}, "and finite"),
        ({"gradient_share": 1.0, "gradient_share_mode": "max"}, "gradient_share_mode is 'max'"),
        ({"gradient_share": 1.0, "gradient_share_over": "p2"}, "gradient_share_over is 'p2'"),
        ({"gradient_share": None, "drop_conflict": True}, "drop_conflict is True, which needs a g"),
    ],
)
def test_setting_outside_its_range_is_named(settings, named):
    with pytest.raises(UserError, match=named):
        DFDHead(criterion=DFDLoss(), **settings)


def test_by_default_distillation_is_never_stronger_than_the_labels():
    share = DFDHead(criterion=DFDLoss()).gradient_share
    assert (share.share, share.mode, share.over, share.drop_conflict) == (1.0, "cap", "all", False)
    assert DFDHead(criterion=DFDLoss(), gradient_share=None).gradient_share is None


def distilled_detector(student, adapter="conv1x1", **head):
    teacher = FrozenTeacher(model=build(seed=1), allow_random=True, precision="fp32")
    head = DFDHead(criterion=DFDLoss(), adapter=adapter, **head)
    return DistilledDetector(student=student, teacher=teacher, head=head).train()


def step(student, *, amp=False, part=None, masks=False, **head):
    """Gradients of one step, by name, and what was logged."""
    torch.manual_seed(0)
    model = distilled_detector(student(), **head)
    model.log.later = True
    torch.manual_seed(1)
    with EventStorage(0) as storage:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            losses = model(make_batch(masks=masks))
        wanted = {
            None: lambda name: True,
            "labels": lambda name: not name.startswith("loss_dfd"),
            "distillation": lambda name: name.startswith("loss_dfd"),
        }[part]
        sum(loss for name, loss in losses.items() if wanted(name)).backward()
        model.log.write()
    logged = {name: value for name, (value, _) in storage.latest().items()}
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found, logged


def checkpointed_vit():
    config = timm_vit_config()
    config.backbone.net.act_checkpoint = True
    return instantiate(config)


STUDENTS = {
    **{kind: (lambda kind=kind: build(kind)) for kind in CONFIGS},
    "vit": lambda: instantiate(timm_vit_config()),
    "checkpointed vit": checkpointed_vit,
}


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("kind", sorted(set(STUDENTS) - {"fcos"}))
def test_every_kind_of_student_is_given_both_gradients_in_proportion(kind, amp):
    student, masks = STUDENTS[kind], kind == "mask_rcnn"
    share = {"gradient_share": 1.0, "gradient_share_mode": "target"}
    found, logged = step(student, amp=amp, masks=masks, **share)
    (factor,) = {v for name, v in logged.items() if name.endswith("gradient_factor")}
    assert factor > 0
    labels, _ = step(student, amp=amp, masks=masks, part="labels")
    distillation, _ = step(student, amp=amp, masks=masks, part="distillation")
    expected = {name: gradient.clone() for name, gradient in labels.items()}
    for name, gradient in distillation.items():
        # The head's own parameters: of the loss as it is.
        weighed = gradient if name.startswith("head.") else factor * gradient
        expected[name] = expected.get(name, 0) + weighed
    assert set(found) == set(expected)
    assert any(name.startswith("head.") for name in distillation)
    for part in ("student.backbone.", "head."):
        ours, theirs = (
            torch.cat([g[name].flatten() for name in expected if name.startswith(part)])
            for g in (found, expected)
        )
        assert (ours - theirs).norm() < (0.05 if amp else 1e-3) * theirs.norm()


def test_measuring_changes_nothing():
    plain, _ = step(STUDENTS["faster_rcnn"], gradient_share=None)
    measured, logged = step(STUDENTS["faster_rcnn"], gradient_share=math.inf)
    torch.testing.assert_close(measured, plain)
    for what in ("ratio", "cosine", "factor"):
        assert all(math.isfinite(logged[f"dfd/p{k}/gradient_{what}"]) for k in range(2, 7))
    assert -1 <= logged["dfd/p2/gradient_cosine"] <= 1


def test_frozen_features_and_an_ended_distillation_are_let_through():
    def frozen():
        model = build()
        model.backbone.requires_grad_(False)
        return model

    assert step(frozen, gradient_share=0.5)[0]
    found, logged = step(STUDENTS["faster_rcnn"], gradient_share=0.5, end_iter=0)
    assert not any("gradient_" in name for name in logged)
    labels, _ = step(STUDENTS["faster_rcnn"], part="labels", end_iter=0)
    for name, gradient in labels.items():
        torch.testing.assert_close(found[name], gradient)


def test_tokens_have_their_own_share():
    def vit():
        return instantiate(timm_vit_config())

    torch.manual_seed(0)
    student, teacher = vit(), FrozenTeacher(model=vit(), allow_random=True, precision="fp32")
    head = DFDHead(criterion=DFDLoss(), trunk=True, gradient_share=0.1)
    model = DistilledDetector(student=student, teacher=teacher, head=head).train()
    model.log.later = True
    with EventStorage(0) as storage:
        sum(model(make_batch()).values()).backward()
        model.log.write()
    factors = {k: v for k, (v, _) in storage.latest().items() if k.endswith("gradient_factor")}
    assert {"dfd/last_feat/gradient_factor", "dfd/p2/gradient_factor"} <= set(factors)
    assert len(set(factors.values())) == 2


@pytest.mark.parametrize(("share", "times"), [(0.1, 1), (1e6, 0), (None, 0)])
def test_that_the_limit_holds_is_told_once(share, times, caplog):
    """Who tunes a weight then sees no difference, and must know why."""
    torch.manual_seed(0)
    model = distilled_detector(build(), gradient_share=share)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with caplog.at_level("INFO"):
        Trainer(model, [make_batch()] * 3, optimizer, device="cpu").train(0, 3)
    assert caplog.text.count("is limited to 0.1 times the labels'") == times
    assert caplog.text.count("is limited to") == times


def test_each_part_of_an_accumulated_step_is_measured():
    torch.manual_seed(0)
    model = distilled_detector(build(), gradient_share=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    data = [make_batch()] * 2
    trainer = Trainer(model, data, optimizer, device="cpu", accumulation_steps=2)
    trainer.train(0, 1)
    assert 0 < trainer.storage.latest()["dfd/p2/gradient_factor"][0] < 1
    assert model.head.gradient_share.take_measured() == []


def process(rank, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    # Each process has the half of either gradient that the other lacks.
    only = "p2" if rank == 0 else "p3"
    zero = torch.zeros(1, 2)
    labels, distilled = (
        {name: g if name == only else zero for name, g in whole.items()}
        for whole in (LABELS, DISTILLED)
    )
    torch.save(gradients(GradientShare(1.0), labels, distilled), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


@pytest.mark.slow
def test_processes_use_the_factor_of_the_whole_batch(tmp_path):
    start_processes(
        process, (free_port(), str(tmp_path)), nprocs=2, start_method=SERVER.get_start_method()
    )
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    expected = sum_of(LENGTH / DISTILLED_LENGTH)
    torch.testing.assert_close({k: found[0][k] + found[1][k] for k in expected}, expected)


@pytest.mark.parametrize("mode", ["cap", "target"])
def test_images_without_labels_share_the_limit_of_their_level(mode):
    """Both together are as long as the labels' gradient on each level, and not each by itself."""
    share = GradientShare(1.0, mode=mode, over="level")
    features = {name: torch.zeros(1, 2, requires_grad=True) for name in LABELS}
    more = {name: torch.zeros(1, 2, requires_grad=True) for name in LABELS}
    unlabelled = {name: 1.0 * f for name, f in more.items()}
    own, theirs = share.split({n: 1.0 * f for n, f in features.items()}, 1.0, unlabelled)
    loss = sum((own[n] * LABELS[n]).sum() for n in LABELS)
    loss = loss + sum(((theirs[n] + unlabelled[n]) * DISTILLED[n]).sum() for n in LABELS)
    loss.backward()
    for name in LABELS:
        parts = torch.cat([features[name].grad - LABELS[name], more[name].grad])
        torch.testing.assert_close(parts.norm(), LABELS[name].norm())
        torch.testing.assert_close(parts[0], parts[1])  # One factor for both.


def test_levels_that_are_not_distilled_have_no_part_in_the_limit():
    share = GradientShare(1.0)
    features = {name: torch.zeros(1, 2, requires_grad=True) for name in LABELS}
    own, theirs = share.split({n: 1.0 * f for n, f in features.items()}, levels={"p2"})
    loss = sum((own[n] * LABELS[n]).sum() for n in LABELS) + (theirs["p2"] * DISTILLED["p2"]).sum()
    loss.backward()
    expected = LABELS["p2"] + 0.3 * DISTILLED["p2"]  # Of length 3 beside 10.
    torch.testing.assert_close(features["p2"].grad, expected)
    torch.testing.assert_close(features["p3"].grad, LABELS["p3"])
    # As the head has it.
    model = distilled_detector(build(), levels=["p3"])
    split = model.head.split(0)
    assert split.keywords["levels"] == {"p3"}

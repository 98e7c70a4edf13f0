"""Best checkpoint, early stop, EMA and validation loss, each by itself."""

import copy
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coco_files import write_mixed_coco
from detectron2.config import LazyCall as L
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from own_toys import build
from torch import nn
from toys import make_batch

from dfd import UserError
from dfd.data import coco_json
from dfd.engine.ended import forget_other_tests
from dfd.engine.hooks import (
    Best,
    BestCheckpoint,
    Checkpoints,
    EarlyStop,
    Evaluation,
    StudentEMA,
    UpdateEMA,
    ValidationLoss,
)
from dfd.engine.hooks.build import run_facts
from dfd.engine.state.checkpoint import StudentCheckpointer
from dfd.engine.trainer import Trainer

pytestmark = pytest.mark.slow

NAN = float("nan")


class Toy(nn.Module):
    """A model with running statistics; its loss is a dict, as a detector's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x):
        return {"loss_cls": (self.layers(x) - 1).square().mean()}


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 2, 4, 4, generator=generator) for _ in range(count)]


def make_trainer(model, count):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, batches(count), optimizer, device="cpu")


def make_checkpointer(model, folder, **parts):
    return StudentCheckpointer(model, str(folder), class_names=["a"], **parts)


def follow(scores, folder, *, mode="max", patience=None, iterations=None, min_delta=0.0):
    """Train with these scores as ``bbox/AP`` after each iteration.

    Returns the trainer, the folder's checkpoints by name, and how often was evaluated.
    """
    iterations = iterations or len(scores)
    model, left, calls = Toy(), iter(scores), []

    def evaluate():
        calls.append(1)
        return {"bbox": {"AP": next(left), "APs": NAN}}

    trainer = make_trainer(model, iterations)
    checkpointer = make_checkpointer(model, folder, trainer=trainer)
    hooks = [
        Evaluation(1, evaluate),
        BestCheckpoint(Best(metric="bbox/AP", mode=mode), 1, model, checkpointer),
    ]
    if patience:
        best = Best(metric="bbox/AP", mode=mode, min_delta=min_delta)
        hooks.append(EarlyStop(best, 1, patience))
    trainer.register_hooks([*hooks, Checkpoints(checkpointer, 100)])
    trainer.train(0, iterations)
    found = {
        path.stem: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pth"))
    }
    return trainer, found, len(calls)


# Best checkpoint.


@pytest.mark.parametrize(
    ("scores", "mode", "where"),
    [
        ([1, 3, 2, 0], "max", 1),
        ([3, 1, 2, 4], "min", 1),
        ([NAN, 2, NAN, 1], "max", 1),
        ([2, NAN, 1, NAN], "min", 2),
        ([float("inf"), 1, float("-inf"), 0], "max", 1),
        ([1, 1, 1, 1], "max", 0),
        ([1, 2, 3, 4], "max", 3),  # Best at the evaluation after training.
    ],
)
def test_best_checkpoint_is_of_the_best_finite_metric(tmp_path, scores, mode, where):
    trainer, found, _ = follow(scores, tmp_path, mode=mode)
    best = found["model_best"]
    assert best["iteration"] == where
    assert best["metric"] == {"name": "bbox/AP", "value": scores[where]}
    assert set(best["model"]) == set(found["model_final"]["model"])
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    last = torch.equal(
        best["model"]["layers.0.weight"], found["model_final"]["model"]["layers.0.weight"]
    )
    assert last == (where == len(scores) - 1)


def test_a_better_student_of_a_killed_part_does_not_stay(tmp_path):
    """The run goes on from its last checkpoint, and may never be as good again."""

    def parts(scores):
        model, left = Toy(), iter(scores)
        trainer, best = make_trainer(model, 7), Best(metric="bbox/AP")
        given = {"trainer": trainer, "best_checkpoint": best}
        checkpointer = make_checkpointer(model, tmp_path, settings={"a": "1"}, **given)
        evaluation = Evaluation(1, lambda: {"bbox": {"AP": next(left)}})
        follows = BestCheckpoint(best, 1, model, checkpointer)
        trainer.register_hooks([evaluation, follows, Checkpoints(checkpointer, 3)])
        return trainer, checkpointer, best

    def saved():
        return torch.load(tmp_path / "model_best.pth", weights_only=True)["iteration"]

    trainer, *_ = parts([1, 5, 2, 7, 8])
    with pytest.raises(StopIteration):  # Killed in its sixth evaluation.
        trainer.train(0, 7)
    assert saved() == 4
    _, checkpointer, best = parts([])
    assert checkpointer.resume()["iteration"] == 2 and best.value == 5
    checkpointer.recall_best()
    assert saved() == 1 == best.iterations - 1
    # Found again and checkpointed, it is no more aside.
    trainer, checkpointer, best = parts([4, 6, 3, 2])
    trainer.train(checkpointer.resume()["iteration"] + 1, 7)
    checkpointer.recall_best()
    assert saved() == 4 and not list(tmp_path.glob(".model_best*"))


def test_what_was_measured_on_other_test_data_begins_anew(tmp_path, caplog):
    best = Best(metric="bbox/AP")
    best.update(30.0, 2)
    checkpointer = make_checkpointer(Toy(), tmp_path, best_checkpoint=best)
    checkpointer.teacher_results = {"bbox": {"AP": 40.0}}
    run = SimpleNamespace(checkpointer=checkpointer)
    moved = "dataloader.test.dataset.json is b.json, was a.json"
    checkpointer.changes = ["train.max_iter is 3, was 2", moved]
    forget_other_tests(run)
    assert best.value == 30.0 and checkpointer.teacher_results
    checkpointer.changes += ["the hash of the test data is b, was a"]
    forget_other_tests(run)
    assert best.value is None and checkpointer.teacher_results is None
    assert "the best bbox/AP until now, 30, was measured otherwise" in caplog.text


def test_metric_that_is_never_a_number_is_never_best(tmp_path):
    _, found, _ = follow([NAN, NAN], tmp_path)
    assert set(found) == {"model_final"}


def test_best_and_final_are_not_among_the_last_k(tmp_path):
    model = Toy()
    checkpointer = make_checkpointer(model, tmp_path)
    for name in ("model_final", "model_0000001", "model_0000003", "model_0000005"):
        checkpointer.save(name, iteration=0)
    for name in ("model_best", "model_ema"):
        checkpointer.export(name, model)
    checkpointer.save("model_0000007", iteration=7)
    checkpointer.keep_last(2)
    assert {path.stem for path in tmp_path.glob("*.pth")} == {
        "model_0000005",
        "model_0000007",
        "model_best",
        "model_ema",
        "model_final",
    }


def test_unknown_metric_names_those_there_are(tmp_path):
    model = Toy()
    trainer = make_trainer(model, 2)
    checkpointer = make_checkpointer(model, tmp_path)
    best = BestCheckpoint(Best(metric="bbox/mAP"), 1, model, checkpointer)
    trainer.register_hooks([Evaluation(1, lambda: {"bbox": {"AP": 1.0, "AP50": 2.0}}), best])
    with pytest.raises(UserError, match=r"no metric 'bbox/mAP'.*there are bbox/AP, bbox/AP50$"):
        trainer.train(0, 2)
    assert trainer.iter == 0


# Early stop.


@pytest.mark.parametrize(
    ("scores", "kwargs", "done", "evaluations"),
    [
        ([1, 3, 2, 2.5, 9, 9], {}, 4, 4),
        ([3, 1, 2, 2, 0, 0], {"mode": "min"}, 4, 4),
        ([1, 1.05, 1.09, 5, 5], {"min_delta": 0.1}, 3, 3),
        ([NAN, NAN, 1, 1], {}, 2, 2),
        ([1, NAN, 2, 1, 3], {}, 5, 5),
        ([1, 2, 3, 4], {}, 4, 4),
    ],
)
def test_run_stops_when_the_metric_has_not_been_better(tmp_path, scores, kwargs, done, evaluations):
    """It ends as a run of that length: last checkpoint saved, weights evaluated once."""
    trainer, found, count = follow(scores, tmp_path, patience=2, iterations=len(scores), **kwargs)
    assert trainer.iter == trainer.max_iter == done
    assert found["model_final"]["iteration"] == done - 1
    assert count == evaluations


def test_process_without_the_metric_stops_with_the_main_one(tmp_path, monkeypatch):
    """Or it would wait for ever for gradients of the others."""
    trainer = make_trainer(Toy(), 4)
    trainer.register_hooks([EarlyStop(Best(metric="bbox/AP"), 1, 2)])
    monkeypatch.setattr("dfd.engine.hooks.best.comm.is_main_process", lambda: False)
    of_the_main = iter([1, 2])
    monkeypatch.setattr(
        "dfd.engine.hooks.best.comm.all_gather", lambda waited: [next(of_the_main), waited]
    )
    trainer.train(0, 4)
    assert trainer.iter == 2


# EMA.


def test_ema_is_the_recursion_once_a_step_and_survives_a_restart(tmp_path):
    decay, model, seen = 0.75, Toy(), []

    class Watch(HookBase):
        def after_step(self):
            seen.append(copy.deepcopy(model.state_dict()))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, batches(8), optimizer, device="cpu", accumulation_steps=2)
    ema = StudentEMA(model, decay)
    checkpointer = make_checkpointer(model, tmp_path, trainer=trainer, ema=ema)
    trainer.register_hooks([UpdateEMA(ema, model, checkpointer), Watch()])
    trainer.train(0, 4)

    expected = seen[0]
    for state in seen[1:]:
        for key, value in state.items():
            mean = decay * expected[key] + (1 - decay) * value
            expected[key] = mean if value.is_floating_point() else value
    assert expected["layers.1.num_batches_tracked"] == 8
    torch.testing.assert_close(dict(ema.model.state_dict()), dict(expected))
    saved = torch.load(tmp_path / "model_ema.pth", weights_only=True)
    torch.testing.assert_close(dict(saved["model"]), dict(expected))
    assert saved["class_names"] == ["a"]

    # One that goes on from its state is the same to the bit.
    checkpointer.save("model_0000003", iteration=3)
    state = torch.load(tmp_path / "model_0000003.pth", weights_only=True)["ema"]
    again = StudentEMA(Toy(), decay)
    again.load_state_dict(state)
    for average in (ema, again):
        average.update(Toy())
    for key, value in ema.state_dict()["model"].items():
        assert torch.equal(value, again.state_dict()["model"][key]), key


def test_ema_with_a_warmup_begins_with_the_weights_before_the_first_step(tmp_path):
    """Also of what was loaded after the EMA was made; the decay grows with the updates."""
    decay, warmup, model, seen = 0.75, 2.5, Toy(), []

    class Watch(HookBase):
        def before_train(self):
            seen.append(copy.deepcopy(model.state_dict()))

        def after_step(self):
            seen.append(copy.deepcopy(model.state_dict()))

    ema = StudentEMA(model, decay, warmup)
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, batches(4), optimizer, device="cpu")
    trainer.register_hooks([Watch(), UpdateEMA(ema, model, make_checkpointer(model, tmp_path))])
    trainer.train(0, 2)
    state = copy.deepcopy(ema.state_dict())
    again = Toy()
    again.load_state_dict(model.state_dict())
    trainer.train(2, 4)

    expected = seen[0]
    # The first state of the second train call is the one after the step before it.
    for n, new in enumerate(seen[1:3] + seen[4:], start=1):
        grown = decay * (1 - math.exp(-n / warmup))
        for key, value in new.items():
            mean = grown * expected[key] + (1 - grown) * value
            expected[key] = mean if value.is_floating_point() else value
        if n == 2:
            torch.testing.assert_close(state["model"], expected)
    torch.testing.assert_close(dict(ema.model.state_dict()), dict(expected))

    # One that goes on from its state is the same to the bit, and is not begun anew.
    resumed = StudentEMA(again, decay, warmup)
    resumed.load_state_dict(state)
    resumed.begin(again)
    for new in (seen[4], seen[5]):
        student = Toy()
        student.load_state_dict(new)
        resumed.update(student)
    for key, value in ema.state_dict()["model"].items():
        assert torch.equal(value, resumed.state_dict()["model"][key]), key


# Validation loss.


def loss_by_hand(model, batch, parts):
    """The mean loss over images, in evaluation but for the parts that give losses in training."""
    model = copy.deepcopy(model).eval()
    for part in ("", *parts):
        model.get_submodule(part).training = True
    losses = [loss_of_image(model, item) for item in batch]
    return {k: sum(x[k] for x in losses).item() / len(losses) for k in losses[0]}


def loss_of_image(model, item):
    """A dense detector's is over the image's own positives, not their running mean."""
    torch.manual_seed(0)
    with torch.no_grad(), EventStorage() as storage:
        losses = model([item])
    if not hasattr(model, "loss_normalizer"):
        return losses
    positives = max(1, storage.latest()["num_pos_anchors"][0])
    return {k: loss * model.loss_normalizer / positives for k, loss in losses.items()}


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("faster_rcnn", ["proposal_generator", "roi_heads"]),
        ("mask_rcnn", ["proposal_generator", "roi_heads", "roi_heads.mask_head"]),
        ("retinanet", []),
        ("fcos", []),
    ],
)
def test_validation_loss_is_the_loss_and_leaves_training_as_it_was(kind, parts):
    model = build(kind)
    if kind == "faster_rcnn":
        model.roi_heads.box_head.add_module("dropout", nn.Dropout(0.5))
        # As in the attention of transformers.
        model.backbone.fpn_lateral3.register_forward_hook(
            lambda module, _, output: nn.functional.dropout(output, 0.5, module.training)
        )
    model.backbone.bottom_up.stem.eval()  # A part that the user has put so.
    batch = make_batch(masks=True) + make_batch(seed=1, masks=True)
    empty = copy.deepcopy(batch[0])
    empty["instances"] = empty["instances"][:0]
    with torch.no_grad(), EventStorage():
        model(batch)  # Statistics and normalisers that are not the initial ones.
    expected = loss_by_hand(model, batch[:3], parts)

    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    normaliser = getattr(model, "loss_normalizer", None)
    with EventStorage() as storage:
        loader = [batch[:1], [empty], batch[1:2], batch[2:]]
        result = ValidationLoss(model, loader, num_images=3)()
        assert not storage.histories()
    assert result["val"] == pytest.approx(expected)
    assert result["val_loss"] == pytest.approx(sum(expected.values()))
    assert [module.training for module in model.modules()] == modes
    assert getattr(model, "loss_normalizer", None) == normaliser
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert all(p.grad is None for p in model.parameters())


class Counting(nn.Module):
    """A detector that keeps what it has seen in a buffer, a number and a list."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(1, 1)
        self.register_buffer("mean", torch.zeros(1))
        self.seen, self.values = 0, []

    def forward(self, batch):
        value = batch[0]["image"].float().mean()
        self.mean.add_(value)
        self.seen += 1
        self.values.append(value.item())
        return {"loss": value * self.mean[0] * self.seen + sum(self.values)}


@pytest.mark.parametrize(
    "kind", ["faster_rcnn", "retinanet", "fcos", "reppoints", "yolox", "counting"]
)
def test_validation_loss_has_neither_order_nor_history(kind):
    batch = [item for seed in range(3) for item in make_batch(seed=seed)]
    for i, item in enumerate(batch):  # Other numbers of positives.
        item["instances"] = item["instances"][: 1 + i % 2]
    model = Counting() if kind == "counting" else build(kind)
    expected = ValidationLoss(model, [[item] for item in batch])()
    assert ValidationLoss(model, [batch[::-1]])() == expected
    assert ValidationLoss(model, [batch[3:], batch[:3]])() == expected
    if kind in ("retinanet", "fcos"):
        model.loss_normalizer = 7.0  # As training leaves another one.
        assert ValidationLoss(model, [batch])() == expected


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 9])
def test_validation_loss_is_of_the_same_images_however_many_processes(monkeypatch, limit):
    """Dealt out to processes of which the first has the first images."""
    model, seen = build("fcos"), []
    batch = [item for seed in range(3) for item in make_batch(seed=seed)]
    batch[1]["instances"] = batch[1]["instances"][:0]
    expected = ValidationLoss(model, [batch], num_images=limit)()["val"]
    parts = [batch[:2], batch[2:3], [], batch[3:]]
    counts = [min(limit, sum(len(i["instances"]) > 0 for i in part)) for part in parts]
    module = "dfd.engine.hooks.evaluation.comm"
    monkeypatch.setattr(f"{module}.gather", lambda here: seen.append(here) or [here])
    for rank, part in enumerate(parts):
        monkeypatch.setattr(f"{module}.get_rank", lambda rank=rank: rank)

        def all_gather(here, rank=rank):
            assert here == counts[rank]
            return counts

        monkeypatch.setattr(f"{module}.all_gather", all_gather)
        monkeypatch.setattr(f"{module}.is_main_process", lambda: False)
        ValidationLoss(model, [part], num_images=limit)()
    assert sum(count for _, count in seen) == min(limit, 5)
    total = {k: sum(sums.get(k, 0.0) for sums, _ in seen) for k in expected}
    assert {k: v / min(limit, 5) for k, v in total.items()} == pytest.approx(expected)


def test_validation_loss_is_the_mean_over_the_images_of_all_processes(monkeypatch):
    model, batch = build("fcos"), make_batch()
    alone = ValidationLoss(model, [batch])()["val"]
    there = ({name: 10.0 for name in alone}, 3)
    monkeypatch.setattr("dfd.engine.hooks.evaluation.comm.gather", lambda here: [here, there])
    together = ValidationLoss(model, [batch])()["val"]
    assert together == pytest.approx({k: (2 * v + 10.0) / 5 for k, v in alone.items()})


def test_evaluation_does_not_draw_from_the_stream_of_training():
    def draw():
        return [torch.rand(1).item(), np.random.rand(), random.random()]

    def drawn_after(evaluate):
        seed_all_rng(3)
        trainer = make_trainer(Toy(), 1)
        trainer.register_hooks([Evaluation(1, evaluate)])
        trainer.train(0, 1)
        return draw()

    assert drawn_after(lambda: {"values": {"x": draw()[0]}}) == drawn_after(lambda: {})


def test_a_summary_knows_the_labels_that_were_measured_against(tmp_path):
    """Else an ablation whose labels were changed between its runs would compare their AP."""
    found, model = [], Toy()
    for folder, change in (("a", {}), ("b", {}), ("c", {"bbox": [2, 3, 11, 12]})):
        (tmp_path / folder).mkdir()
        paths = write_mixed_coco(tmp_path / folder, number=2, **change)
        cfg = OmegaConf.create(
            {
                "dataloader": {"test": {"dataset": L(coco_json)(**paths)}},
                "train": {"output_dir": str(tmp_path), "seed": 0, "device": "cpu"},
            },
            flags={"allow_objects": True},
        )
        facts = run_facts(cfg, model, make_checkpointer(model, tmp_path), {}, None)
        found.append(facts["test_data"])
    assert found[0] == found[1] != found[2]

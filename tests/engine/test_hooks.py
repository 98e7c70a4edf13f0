"""Best checkpoint, early stop, EMA, validation loss, Weights & Biases."""

import copy
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from commands import command, run
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from torch import nn
from toys import build, make_batch

from dfd import UserError
from dfd.engine.checkpoint import StudentCheckpointer, kept_random_state
from dfd.engine.config import load_config
from dfd.engine.hooks import (
    Best,
    BestCheckpoint,
    Checkpoints,
    EarlyStop,
    Evaluation,
    StudentEMA,
    UpdateEMA,
    ValidationLoss,
    check_hooks,
)
from dfd.engine.trainer import Trainer

NAN = float("nan")
MACHINE = ("time", "data_time", "eta_seconds", "rank_data_time", "peak_memory_mib")


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
        ([1, 2, 3, 4], "max", 3),  # Of the evaluation after training.
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


# Validation loss.


def loss_by_hand(model, batch, parts):
    """The mean loss over images, in evaluation but for the parts that give losses in training."""
    model = copy.deepcopy(model).eval()
    for part in ("", *parts):
        model.get_submodule(part).training = True
    torch.manual_seed(0)
    with torch.no_grad(), EventStorage():
        losses = [model([item]) for item in batch]
    return {k: sum(x[k] for x in losses).item() / len(losses) for k in losses[0]}


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


def test_validation_loss_is_the_mean_over_the_images_of_all_processes(monkeypatch):
    model, batch = build("fcos"), make_batch()
    alone = ValidationLoss(model, [batch])()["val"]
    there = ({name: 10.0 for name in alone}, 3)
    monkeypatch.setattr("dfd.engine.hooks.evaluation.comm.gather", lambda here: [here, there])
    together = ValidationLoss(model, [batch])()["val"]
    assert together == pytest.approx({k: (2 * v + 10.0) / 5 for k, v in alone.items()})


def test_evaluation_does_not_draw_from_the_stream_of_training():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with kept_random_state():
        torch.manual_seed(0)
        torch.rand(5)
    assert torch.equal(torch.rand(2), expected)


# All of them in a run.

HOOKS = [
    "train.max_iter=6",
    "train.eval_period=2",
    "train.checkpointer.period=3",
    "train.ema.decay=0.6",
    "train.val_loss.period=2",
    "train.best_checkpoint.metric=val_loss",
    "train.best_checkpoint.mode=min",
    "train.early_stop.metric=bbox/AP",
    "train.early_stop.mode=min",
    "train.early_stop.patience=50",
]


def read_metrics(folder):
    lines = [json.loads(line) for line in open(folder / "metrics.json")]
    return [{k: v for k, v in line.items() if k not in MACHINE} for line in lines]


def assert_same(a, b, where):
    """Equal to the bit, whatever the machine took for it."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in MACHINE:
                assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert repr(a) == repr(b), where


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data, configs):
    folder = tmp_path_factory.mktemp("hooks") / "whole"
    run(configs["student"], *data, *HOOKS, f"train.output_dir={folder}")
    return folder


def test_run_logs_and_saves_what_was_asked_for(whole):
    lines = {line["iteration"]: line for line in read_metrics(whole)}
    for iteration in (1, 3, 6):
        line = lines[iteration]
        terms = {k: v for k, v in line.items() if k.startswith("val/")}
        assert set(terms) == {
            f"val/loss_{name}" for name in ("cls", "box_reg", "rpn_cls", "rpn_loc")
        }
        assert line["val_loss"] == pytest.approx(sum(terms.values()))
        assert {"bbox/AP", "ema/bbox/AP"} <= set(line)
    assert "val_loss" not in lines[0] and "val_loss" not in lines[2]
    values = {i: line["val_loss"] for i, line in lines.items() if "val_loss" in line}
    best = torch.load(whole / "model_best.pth", weights_only=True)
    assert best["metric"]["value"] == min(values.values())
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["best_checkpoint"]["value"] == min(values.values())
    assert "AP" in summary["results"]["ema"]["bbox"]


def test_hooks_change_nothing_in_training(whole, data, configs, tmp_path):
    """Same weights, same metrics as without: in particular the same random numbers."""
    shared = ["train.max_iter=6", "train.eval_period=0", "train.checkpointer.period=3"]
    run(configs["student"], *data, *shared, f"train.output_dir={tmp_path}")
    with_hooks, without = (
        torch.load(folder / "model_final.pth", weights_only=True) for folder in (whole, tmp_path)
    )
    assert_same(without["model"], with_hooks["model"], "model")
    for a, b in zip(read_metrics(tmp_path), read_metrics(whole), strict=True):
        assert_same(a, {key: b[key] for key in a}, f"metrics {a['iteration']}")


def test_killed_and_resumed_run_is_the_same(whole, data, configs, tmp_path, monkeypatch):
    step = Trainer.run_step

    def killed(trainer):
        if trainer.iter == 4:
            raise KeyboardInterrupt
        step(trainer)

    monkeypatch.setattr(Trainer, "run_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(configs["student"], *data, *HOOKS, f"train.output_dir={tmp_path}")
    assert not (tmp_path / "model_ema.pth").exists()
    monkeypatch.setattr(Trainer, "run_step", step)
    run(configs["student"], "--resume", *data, *HOOKS, f"train.output_dir={tmp_path}")
    for name in ("model_final", "model_best", "model_ema"):
        a, b = (
            torch.load(folder / f"{name}.pth", weights_only=True) for folder in (whole, tmp_path)
        )
        for content in (a, b):
            content.pop("settings", None)
        assert_same(a, b, name)
    assert a["model"].keys() == torch.load(whole / "model_final.pth")["model"].keys()
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert final["ema"]["updates"] == 6
    assert final["early_stop"]["waited"] > 0
    assert_same(read_metrics(whole), read_metrics(tmp_path), "metrics")


def test_ema_is_evaluated_and_saved_as_a_plain_student(whole, data, configs, caplog):
    saved = torch.load(whole / "model_ema.pth", weights_only=True)["model"]
    final = torch.load(whole / "model_final.pth", weights_only=True)
    assert_same(saved, final["ema"]["model"], "ema")
    assert not torch.equal(
        saved["backbone.fpn_output3.weight"], final["model"]["backbone.fpn_output3.weight"]
    )
    student = build(seed=5)
    checkpointer, incompatible = DetectionCheckpointer(student), []
    checkpointer._log_incompatible_keys = incompatible.append
    checkpointer.load(str(whole / "model_ema.pth"))
    assert not any(x for i in incompatible for x in i)
    assert_same(dict(student.state_dict()), dict(saved), "loaded")
    caplog.clear()
    run(
        configs["student"],
        "--eval-only",
        *data,
        f"train.output_dir={whole}",
        f"train.init_checkpoint={whole}/model_ema.pth",
    )
    results = json.loads((whole / "summary.json").read_text())["results"]["ema"]["bbox"]
    assert ",".join(f"{results[k]:.4f}" for k in ("AP", "AP50", "AP75")) in caplog.text


def test_best_by_the_emas_metric_is_the_ema(data, configs, tmp_path, monkeypatch):
    scores, evaluated = [0.1, 0.2, 0.1, 0.9, 0.1, 0.3], []  # Student, EMA, in turn.

    def evaluate(cfg, student):
        evaluated.append(copy.deepcopy(student.state_dict()))
        return {"bbox": {"AP": scores[len(evaluated) - 1]}}

    monkeypatch.setattr("dfd.engine.build.test", evaluate)
    run(
        configs["student"],
        *data,
        f"train.output_dir={tmp_path}",
        "train.max_iter=3",
        "train.eval_period=1",
        "train.checkpointer.period=1",
        "train.ema.decay=0.5",
        "train.best_checkpoint.metric=ema/bbox/AP",
    )
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    second = torch.load(tmp_path / "model_0000001.pth", weights_only=True)
    assert best["metric"]["value"] == 0.9
    assert_same(best["model"], second["ema"]["model"], "best")
    assert_same(dict(evaluated[2]), dict(second["model"]), "student")
    assert_same(dict(evaluated[3]), dict(second["ema"]["model"]), "ema")


def test_early_stop_ends_a_run_and_more_patience_continues_it(data, configs, tmp_path, caplog):
    shared = [
        *data,
        f"train.output_dir={tmp_path}",
        "optimizer.lr=0",  # So that nothing ever gets better.
        "train.max_iter=5",
        "train.val_loss.period=1",
        "train.val_loss.num_images=1",
        "train.early_stop.metric=val_loss",
        "train.early_stop.mode=min",
        "train.early_stop.min_delta=100",
    ]
    stopped = [*shared, "train.early_stop.patience=1"]
    run(configs["student"], *stopped)
    assert "Early stop after 2 of 5 iterations: val_loss has not been better" in caplog.text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["iterations"] == 2
    assert "AP" in summary["results"]["bbox"]
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 1
    assert read_metrics(tmp_path)[-1]["iteration"] == 2

    run(configs["student"], "--resume", *stopped)
    assert "Nothing to do" in caplog.text
    # Killed after its last step, but before it was evaluated.
    (tmp_path / "summary.json").unlink()
    metrics = read_metrics(tmp_path)
    run(configs["student"], "--resume", *stopped)
    assert json.loads((tmp_path / "summary.json").read_text())["iterations"] == 2
    assert_same(read_metrics(tmp_path), metrics, "metrics")

    run(configs["student"], "--resume", *shared, "train.early_stop.patience=9")
    assert json.loads((tmp_path / "summary.json").read_text())["iterations"] == 5


def test_hooks_may_begin_in_a_continued_run(whole, data, configs, tmp_path):
    out = f"train.output_dir={tmp_path}"
    run(configs["student"], *data, out, "train.max_iter=2")
    run(configs["student"], "--resume", *data, *HOOKS, out)
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["ema"]["updates"] == 4


def test_two_processes_stop_together(data, configs, tmp_path):
    result = command(
        configs["student"],
        "--num-gpus=2",
        *data,
        f"train.output_dir={tmp_path}",
        "optimizer.lr=0",
        "train.max_iter=9",
        "train.eval_period=1",
        "train.ema.decay=0.5",
        "train.val_loss.period=1",
        "train.best_checkpoint.metric=val_loss",
        "train.best_checkpoint.mode=min",
        "train.early_stop.metric=ema/bbox/AP",
        "train.early_stop.min_delta=200",
        "train.early_stop.patience=1",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "summary.json").read_text())["iterations"] <= 2
    names = {path.name for path in tmp_path.glob("*.pth")}
    assert {"model_best.pth", "model_ema.pth", "model_final.pth"} <= names


# Weights & Biases.


class FakeWandb(SimpleNamespace):
    """What of wandb is used; a run that is continued has the step after its last."""

    def __init__(self):
        super().__init__(runs=[], lines=[])

    def init(self, **settings):
        self.runs.append(settings)
        step = max((step for step, _ in self.lines), default=-1) + 1
        return SimpleNamespace(
            id=settings["id"] or "abc",
            step=step if settings["resume"] else 0,
            log=lambda values, step: self.lines.append((step, dict(values))),
            finish=lambda: self.lines.append((math.inf, {})),
        )


def test_wandb_gets_the_metrics_once_and_goes_on_after_a_resume(
    data, configs, tmp_path, monkeypatch
):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    shared = [*data, f"train.output_dir={tmp_path}", "train.wandb.project=toy"]
    run(configs["student"], *shared, "train.max_iter=2")
    ended = fake.lines.pop()
    assert ended[0] == math.inf
    # Killed after more iterations than its last checkpoint holds.
    fake.lines = [line for line in fake.lines if line[0] < 2] + [(2, {"total_loss": 1.0})]
    run(configs["student"], "--resume", *shared, "train.max_iter=4")
    first, second = fake.runs
    assert (first["project"], first["id"], first["resume"]) == ("toy", None, None)
    assert first["config"]["train"]["max_iter"] == 2
    assert first["config"]["model"]["_target_"].endswith("GeneralizedRCNN")
    json.dumps(first["config"])
    assert (second["id"], second["resume"]) == ("abc", "allow")
    assert fake.lines.pop()[0] == math.inf
    steps = [step for step, _ in fake.lines]
    assert steps == sorted(set(steps)) == [0, 1, 2, 3, 4]
    lines = {line["iteration"]: line for line in read_metrics(tmp_path)}
    for step in (3, 4):
        sent = {k: v for k, v in fake.lines[step][1].items() if k not in MACHINE}
        assert_same(sent | {"iteration": step}, lines[step], f"line {step}")


def test_wandb_is_not_imported_unless_asked_for(whole):
    assert "wandb" not in sys.modules


# Bad settings.


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.ema.decay=1"], "train.ema.decay is 1"),
        (["train.ema.decay=0.0"], "train.ema.decay is 0.0"),
        (["train.ema.decay=slow"], "train.ema.decay is slow"),
        (["train.val_loss.period=-1"], "train.val_loss.period is -1"),
        (["train.val_loss.period=null"], "train.val_loss.period is None"),
        (["train.val_loss.num_images=0"], "train.val_loss.num_images is 0"),
        (["train.best_checkpoint.metric=bbox/AP"], "but train.eval_period is 0"),
        (["train.best_checkpoint.metric=val_loss"], "but train.val_loss.period is 0"),
        (
            ["train.eval_period=1", "train.best_checkpoint.metric=ema/bbox/AP"],
            "there is no EMA: set train.ema.decay",
        ),
        (
            [
                "train.eval_period=1",
                "train.best_checkpoint.metric=bbox/AP",
                "train.best_checkpoint.mode=up",
            ],
            "train.best_checkpoint.mode is 'up'",
        ),
        (["train.best_checkpoint.metric=3"], "train.best_checkpoint.metric is 3"),
        (
            ["train.early_stop.metric=bbox/AP", "train.early_stop.patience=3"],
            "but train.eval_period is 0",
        ),
        (
            ["train.eval_period=1", "train.early_stop.metric=bbox/AP"],
            "a metric but no patience",
        ),
        (["train.early_stop.patience=3"], "a patience but no metric"),
        (
            [
                "train.eval_period=1",
                "train.early_stop.metric=bbox/AP",
                "train.early_stop.patience=0",
            ],
            "train.early_stop.patience is 0",
        ),
        (["train.early_stop.min_delta=-1"], "train.early_stop.min_delta is -1"),
        (["+train.early_stop.patiense=3"], "train.early_stop has no 'patiense'"),
        (["train.ema=null"], "train.ema has no 'None'"),
    ],
)
def test_bad_setting_is_one_line_at_the_start(configs, overrides, named):
    cfg = load_config(configs["student"], overrides)
    with pytest.raises(UserError) as error:
        check_hooks(cfg)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_wandb_that_is_not_installed_is_one_line_at_the_start(
    data, configs, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        run(configs["student"], *data, "train.wandb.project=p", f"train.output_dir={out}")
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: train.wandb.project is set, but wandb cannot be imported")
    assert "pip install wandb" in lines[-1]
    assert not out.exists()


def test_validation_loss_needs_labels(data, configs, tmp_path, capsys):
    path = tmp_path / "unlabelled.json"
    test_json = next(o for o in data if o.startswith("dataloader.test.dataset.json="))
    content = json.loads(open(test_json.partition("=")[2]).read())
    path.write_text(json.dumps(content | {"annotations": []}))
    with pytest.raises(SystemExit):
        run(
            configs["student"],
            *data,
            f"dataloader.test.dataset.json={path}",
            f"train.output_dir={tmp_path / 'out'}",
            "train.val_loss.period=1",
        )
    assert "train.val_loss needs labelled test data" in capsys.readouterr().err

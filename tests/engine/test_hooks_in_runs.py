"""Best checkpoint, early stop, EMA and validation loss in whole runs, also resumed ones."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from commands import run
from detectron2.checkpoint import DetectionCheckpointer
from interrupted import Killed, at_iteration, interrupted
from run_files import assert_same, read_metrics
from toys import build

from dfd.engine.trainer import Trainer

pytestmark = pytest.mark.slow

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


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data, configs):
    folder = tmp_path_factory.mktemp("hooks") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        # Which cannot be imported then: nobody asks for it.
        patch.setitem(sys.modules, "wandb", None)
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
    kept = [whole / "inference" / part / "coco_instances_results.json" for part in ("", "ema")]
    student_s, averages = (json.loads(path.read_text()) for path in kept)
    assert student_s != averages
    results = json.loads((whole / "summary.json").read_text())["results"]["ema"]["bbox"]
    assert ",".join(f"{results[k]:.4f}" for k in ("AP", "AP50", "AP75")) in caplog.text


def test_code_that_a_run_names_is_that_of_its_start(data, configs, tmp_path, monkeypatch):
    """Which a user may update while the run goes on."""
    order, step = [], Trainer.run_step
    monkeypatch.setattr(
        "dfd.engine.hooks.build.code_version", lambda: order.append("code") or {"sha256": "x"}
    )
    monkeypatch.setattr(Trainer, "run_step", lambda self: (order.append("step"), step(self)))
    run(configs["student"], *data, "train.max_iter=1", f"train.output_dir={tmp_path}")
    assert order == ["code", "step", "code"]
    assert json.loads((tmp_path / "summary.json").read_text())["code"] == {"sha256": "x"}


def test_best_by_the_emas_metric_is_the_ema(data, configs, tmp_path, monkeypatch):
    scores, evaluated = [0.1, 0.2, 0.1, 0.9, 0.1, 0.3], []  # Student, EMA, in turn.

    def evaluate(cfg, student, keep=None, part=""):
        evaluated.append(copy.deepcopy(student.state_dict()))
        return {"bbox": {"AP": scores[len(evaluated) - 1]}}

    monkeypatch.setattr("dfd.engine.hooks.build.test", evaluate)
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


def test_early_stop_ends_a_run_and_more_patience_continues_it(data, configs, tmp_path):
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
    log = (tmp_path / "log.txt").read_text
    assert "Early stop after 2 of 5 iterations: val_loss has not been better" in log()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["iterations"] == 2
    assert "AP" in summary["results"]["bbox"]
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 1
    assert read_metrics(tmp_path)[-1]["iteration"] == 2

    run(configs["student"], "--resume", *stopped)
    assert "Nothing to do" in log()
    # Killed after its last step, but before it was evaluated.
    (tmp_path / "summary.json").unlink()
    metrics = read_metrics(tmp_path)
    run(configs["student"], "--resume", *stopped)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["iterations"] == 2 and summary["early_stop"]["waited"] == 1
    assert_same(read_metrics(tmp_path), metrics, "metrics")

    run(configs["student"], "--resume", *shared, "train.early_stop.patience=9")
    assert json.loads((tmp_path / "summary.json").read_text())["iterations"] == 5


@pytest.mark.parametrize("killed", [False, True], ids=["straight on", "killed in between"])
def test_longer_run_knows_its_earlier_end(data, configs, tmp_path, monkeypatch, killed):
    """What was evaluated after the last step of then stays known, logged and counted."""
    scores = [0.9, 0.1]
    monkeypatch.setattr(
        "dfd.engine.hooks.build.test", lambda *_: {"bbox": {"AP": scores.pop(0)}}
    )
    shared = [
        *data,
        f"train.output_dir={tmp_path}",
        "train.eval_period=2",
        "train.best_checkpoint.metric=bbox/AP",
        "train.early_stop.metric=bbox/AP",
        "train.early_stop.patience=5",
    ]
    run(configs["student"], *shared, "train.max_iter=2")
    if killed:  # Before its first checkpoint.
        with interrupted(Killed, Trainer, "run_step", at_iteration(3), 1):
            run(configs["student"], "--resume", *shared, "train.max_iter=4")
        assert not (tmp_path / "summary.json").exists()
    run(configs["student"], "--resume", *shared, "train.max_iter=4")
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert (best["metric"]["value"], best["iteration"]) == (0.9, 1)
    lines = read_metrics(tmp_path)
    assert [line["bbox/AP"] for line in lines if "bbox/AP" in line] == [0.9, 0.1]
    steps = [line["iteration"] for line in lines if "total_loss" in line]
    assert steps == [0, 1, 2, 3]  # And no step is left out for that.
    state = json.loads((tmp_path / "summary.json").read_text())["early_stop"]
    assert (state["value"], state["waited"]) == (0.9, 1)


def test_ended_run_gives_no_results_of_other_test_data(whole, data, configs, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    shared = [*data, *HOOKS, f"train.output_dir={tmp_path / 'run'}", "--resume"]
    other = "dataloader.test.mapper.augmentations.0.max_size=50"
    shared.append(f"dataloader.evaluator.output_dir={tmp_path / 'elsewhere'}")
    for more in ([], ["--dry-run"]):
        run(configs["student"], *shared, *more)
        with pytest.raises(SystemExit):
            run(configs["student"], *shared, *more, other)
        said = capsys.readouterr().err
        assert "has ended, and dataloader.test.mapper.augmentations.0.max_size is 50, was" in said
        assert "evaluate its model_final.pth with --eval-only" in said


def test_a_longer_run_begins_with_the_best_that_it_knows(whole, data, configs, tmp_path):
    """Not with one of a part that was killed, or of data that were other ones then."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    summary = json.loads((whole / "summary.json").read_text())
    assert len(summary["train_data"]) == 16 and summary["start"] is None
    (folder / "model_best.pth").rename(folder / ".model_best_before.pth")
    torch.save({"iteration": 999}, folder / "model_best.pth")
    longer = [*data, *HOOKS, f"train.output_dir={folder}", "--resume", "train.max_iter=7"]
    run(configs["student"], *longer)
    assert torch.load(folder / "model_best.pth", weights_only=True)["iteration"] < 7
    assert not (folder / ".model_best_before.pth").exists()
    more = ["train.max_iter=8", "dataloader.test.mapper.augmentations.0.max_size=50"]
    run(configs["student"], *longer, *more)
    assert "was measured otherwise" in (folder / "log.txt").read_text()


def test_ended_run_gives_no_results_of_other_labels(whole, data, configs, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    summary = json.loads((folder / "summary.json").read_text())
    summary["test_data"] = "0" * 64  # As if the labels under that path had been others then.
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(SystemExit):
        run(configs["student"], *data, *HOOKS, f"train.output_dir={folder}", "--resume")
    assert "the labels of its test data were changed since" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_folder_of_a_training_that_runs_is_refused(data, configs, tmp_path, more, capsys):
    """One run's weights would stand beside the other's config."""
    hold = "import sys; from dfd.engine.state.files import sole_writer\n"
    hold += "with sole_writer(sys.argv[1]): print(flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], **pipes) as other:
        other.stdout.readline()
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit):
            run(configs["student"], *data, *more, f"train.output_dir={tmp_path}")
        assert f"train.output_dir {tmp_path} is in use by another" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before
        other.communicate()
    shared = ["train.max_iter=1", "train.eval_period=0", f"train.output_dir={tmp_path}"]
    run(configs["student"], *data, *more, *shared)  # It is free again.


def test_hooks_may_begin_in_a_continued_run(whole, data, configs, tmp_path):
    out = f"train.output_dir={tmp_path}"
    run(configs["student"], *data, out, "train.max_iter=2")
    run(configs["student"], "--resume", *data, *HOOKS, out)
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["ema"]["updates"] == 4

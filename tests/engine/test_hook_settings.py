"""Bad settings of the hooks, which are told at the start; Weights & Biases."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
from commands import run
from run_files import MACHINE, assert_same, read_metrics

from dfd import UserError
from dfd.engine.config.load import load_config
from dfd.engine.config.schema import check_settings, check_training


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


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.ema.decay=1"], "train.ema.decay is 1"),
        (["train.ema.decay=0.0"], "train.ema.decay is 0.0"),
        (["train.ema.decay=slow"], "train.ema.decay is slow"),
        (["train.ema.warmup=0"], "train.ema.warmup is 0: it must be a number above 0, or null"),
        (["train.ema.warmup=-2000"], "train.ema.warmup is -2000"),
        (["train.ema.warmup=long"], "train.ema.warmup is long"),
        (["train.ema.warmup=True"], "train.ema.warmup is True"),
        (["train.ema.warmup=inf"], "train.ema.warmup is inf"),
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
            ["train.val_loss.period=1", "train.best_checkpoint.metric=val_loss"],
            "the worst would count as the best: set train.best_checkpoint.mode=min",
        ),
        (
            [
                "train.val_loss.period=1",
                "train.early_stop.metric=val/loss_cls",
                "train.early_stop.patience=3",
            ],
            "the worst would count as the best: set train.early_stop.mode=min",
        ),
        (["+train.clip_gradient_norm=1"], "train has no 'clip_gradient_norm', and nothing would"),
        (["+train.accumulation_step=2"], "write 'accumulation_steps', or give a setting of your"),
        (["+train.checkpointer.max_keep=2"], "train.checkpointer has no 'max_keep'"),
        (["+train.amp.dtpe=fp16"], "train.amp has no 'dtpe': it has enabled, dtype"),
        (["train.seed=5000000000"], "train.seed is 5000000000; it must be an integer of at most"),
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
        check_settings(cfg)
        check_training(cfg)
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

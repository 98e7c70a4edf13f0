"""A run that was killed or told to stop is resumed and ends as the one that never was."""

import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch
from commands import run
from detectron2.evaluation import COCOEvaluator
from interrupted import Killed, assert_same, at_iteration, interrupted, kill_resume, names
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dfd.engine.config.load import ConfigFile
from dfd.engine.hooks import RunSummary
from dfd.engine.run_folder import load_runs
from dfd.engine.state import checkpoint as checkpoint_module
from dfd.engine.stop import EXIT_STOPPED, STOP_SIGNALS
from dfd.engine.trainer import Trainer
from dfd.research.ablate import Ablation, make_cells, plan_runs
from dfd.research.analyse import analyse

pytestmark = pytest.mark.slow

# Everything that a run has to remember; a checkpoint after iterations 1, 3, 5 and 7. The loss on
# test images is never better by so much, so early stop waits for longer each time.
LONG = [
    "train.max_iter=8",
    "train.log_period=3",
    "train.eval_period=5",
    "train.accumulation_steps=2",
    "train.clip_grad_norm=1",
    "dataloader.train.unlabelled=${dataloader.train.dataset}",
    "dataloader.train.unlabelled_batch_size=2",
    "train.checkpointer.max_to_keep=2",
    "train.ema.decay=0.6",
    "train.val_loss.period=2",
    "train.val_loss.num_images=1",
    "train.best_checkpoint.metric=val_loss",
    "train.best_checkpoint.mode=min",
    "train.early_stop.metric=val_loss",
    "train.early_stop.mode=min",
    "train.early_stop.min_delta=100",
    "train.early_stop.patience=50",
    "model.head.warmup_iters=6",
    "model.head.adapter=conv1x1",
    "model.head.criterion.lenient=context",
    "model.head.criterion.leniency=[1,0.2]",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, data, configs):
    folder = tmp_path_factory.mktemp("teacher")
    run(configs["teacher"], *data, "train.max_iter=1", f"train.output_dir={folder}")
    return folder / "model_final.pth"


@pytest.fixture(scope="module")
def settings(data, teacher):
    return [*data, *LONG, f"model.teacher.checkpoint={teacher}"]


@pytest.fixture(scope="module")
def start(configs, settings):
    """Start the long run in a folder."""

    def call(folder, *arguments):
        flags = [a for a in arguments if a.startswith("--")]
        others = [a for a in arguments if not a.startswith("--")]
        run(configs["dfd"], *flags, *settings, f"train.output_dir={folder}", *others)

    return call


@pytest.fixture(scope="module")
def straight(tmp_path_factory, start):
    """The run that is never interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    start(folder)
    final = torch.load(folder / "model_final.pth", weights_only=True)
    assert final["early_stop"]["waited"] > 0 and final["ema"]["updates"] == 8
    return folder


@pytest.fixture(scope="module")
def killed_at_6(tmp_path_factory, start):
    """One that was killed in iteration 6; its checkpoints are those after 3 and 5."""
    folder = tmp_path_factory.mktemp("killed")
    with interrupted(Killed, Trainer, "run_step", at_iteration(6)):
        start(folder)
    assert names(folder) == "3 5 best"
    return folder


@pytest.fixture
def killed(killed_at_6, tmp_path):
    """A copy of it to resume, or to do something to."""
    return Path(shutil.copytree(killed_at_6, tmp_path / "killed"))


def iterations(folder):
    return [json.loads(line)["iteration"] for line in open(folder / "metrics.json")]


def of_last_checkpoint(path, mode="w"):
    return os.path.basename(path) == "last_checkpoint"


# How, where, and the checkpoints that are there then.
MOMENTS = {
    "killed before the first checkpoint": (Killed, Trainer, "run_step", at_iteration(1), 1, ""),
    "killed before the first checkpoint is named the last": (
        Killed, checkpoint_module, "whole_file", of_last_checkpoint, 1, "1 best"
    ),
    "killed in the evaluation on the way": (
        Killed, COCOEvaluator, "evaluate", lambda _: True, 1, "1 3 best"
    ),
    "killed in the last evaluation": (
        Killed, COCOEvaluator, "evaluate", lambda _: True, 3, "5 7 best ema final"
    ),
    # It logs all that it has done; some of it is done again.
    "interrupted": (KeyboardInterrupt, Trainer, "run_step", at_iteration(5), 1, "1 3 best"),
    "told before training": (signal.SIGTERM, Trainer, "train", lambda *_: True, 1, ""),
    "told in an accumulated step": (
        signal.SIGUSR1, Trainer, "_losses", at_iteration(2), 2, "1 2 best"
    ),
    "told before a checkpoint": (
        signal.SIGTERM, Trainer, "run_step", at_iteration(3), 1, "1 3 best"
    ),
    "told in the last step": (
        signal.SIGUSR1, Trainer, "run_step", at_iteration(7), 1, "5 7 best final"
    ),
    "told after training": (
        signal.SIGTERM, RunSummary, "after_train", lambda _: True, 1, "5 7 best ema final"
    ),
}  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupted_run_ends_as_the_one_that_never_was(straight, start, tmp_path, caplog, moment):
    *where, saved = MOMENTS[moment]
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    with interrupted(*where) as end:
        start(tmp_path)
    if moment.startswith("told"):
        assert end.value.code == EXIT_STOPPED == 75
    if moment == "interrupted":
        assert max(iterations(tmp_path)) > 3
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    assert names(tmp_path) == saved
    assert not (tmp_path / "summary.json").exists()
    start(tmp_path, "--resume")
    assert "may not end" not in caplog.text and "Cannot find the hook" not in caplog.text
    assert_same(tmp_path, straight)
    assert json.loads((tmp_path / "summary.json").read_text())["iterations"] == 8


@pytest.mark.parametrize("number", [1, 3])
def test_run_killed_in_a_checkpoint_leaves_nothing_half(
    straight, start, tmp_path, monkeypatch, number
):
    save, partial = torch.save, f".model_{2 * number - 1:07d}.pth.partial"

    def half_written(content, file):
        if not file.name.endswith(partial):
            return False
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        # What is killed cleans nothing up.
        patch.setattr("os.remove", mock.Mock(side_effect=OSError))
        return True

    with monkeypatch.context() as patch, interrupted(Killed, torch, "save", half_written):
        start(tmp_path)
    assert [path.name for path in tmp_path.glob(".*.partial")] == [partial]
    assert names(tmp_path) == ("best" if number == 1 else "1 3 best")
    # Another period, so that no later checkpoint takes the same name.
    start(tmp_path, "--resume", "train.checkpointer.period=7")
    assert not list(tmp_path.glob(".*.partial"))
    assert_same(tmp_path, straight)


# Kills itself in its seventh iteration, as long as a file is there.
KILLED_ONCE = """
import os, pathlib, signal, sys
sys.path[:0] = ["tests", "tests/engine"]
from dfd.engine import argument_parser, launch, main
from dfd.engine.trainer import Trainer
step, marker = Trainer.run_step, pathlib.Path(__file__).with_name("kill")
def killing(trainer):
    if trainer.iter == 6 and marker.exists():
        marker.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    step(trainer)
Trainer.run_step = killing
parser = argument_parser()
parser.set_defaults(dist_url="auto")
launch(main, parser.parse_args())
"""


def test_ablation_continues_a_run_that_the_system_killed(
    straight, settings, configs, tmp_path, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    script, marker = tmp_path / "killed_once.py", tmp_path / "kill"
    script.write_text(KILLED_ONCE)
    marker.touch()
    config, out = ConfigFile(configs["dfd"]), tmp_path / "out"
    cells = make_cells(
        grids=["train.max_iter=[8]"],
        overrides=[text for text in settings if "max_iter" not in text],
    )
    runs = plan_runs(config=config, cells=cells, seeds=[0], out=out)
    program = (sys.executable, str(script))
    given = Ablation(config, out, cells, runs, cells[0], metric="AP", program=program)
    assert [outcome.status for outcome in given.execute()] == ["failed"]
    assert not marker.exists()
    assert [outcome.status for outcome in given.execute()] == ["done"]
    assert_same(runs[0].folder, straight)


@pytest.mark.parametrize("damage", ["truncated", "gone", "not named the last"])
def test_last_checkpoint_that_can_be_read_is_used(straight, killed, start, caplog, damage):
    last, used = killed / "model_0000005.pth", "model_0000003.pth"
    if damage == "gone":
        last.unlink()
    elif damage == "truncated":
        last.write_bytes(last.read_bytes()[:-5000])
    else:
        (killed / "last_checkpoint").unlink()
        used = last.name
    start(killed, "--resume")
    assert (f"cannot read {last}" in caplog.text) is (used != last.name)
    assert f"Resumed from {killed / used}" in caplog.text
    assert_same(killed, straight)
    # What was logged is logged and shown once, though some of it was done again.
    assert iterations(killed) == iterations(straight)
    shown, expected = (EventAccumulator(str(path)).Reload() for path in (killed, straight))
    for key in ("total_loss", "bbox/AP"):
        assert [e.step for e in shown.Scalars(key)] == [e.step for e in expected.Scalars(key)]


@pytest.mark.parametrize("damage", ["truncated", "of another program"])
def test_no_readable_checkpoint_is_an_error_not_a_new_beginning(killed, start, capsys, damage):
    for path in killed.glob("*.pth"):
        if damage == "truncated":
            path.write_bytes(b"PK")
        else:
            torch.save({"model": {}, "iteration": 3}, path)
    before = (killed / "metrics.json").read_bytes()
    with pytest.raises(SystemExit):
        start(killed, "--resume")
    error = capsys.readouterr().err
    assert "error: --resume: no checkpoint in" in error and "move the folder away" in error
    assert (killed / "metrics.json").read_bytes() == before


def test_changed_teacher_file_is_refused(killed, start, teacher, tmp_path, capsys):
    content = torch.load(teacher, weights_only=True)
    content["model"]["roi_heads.box_head.fc1.bias"] += 1
    changed = tmp_path / "teacher.pth"
    torch.save(content, changed)
    with pytest.raises(SystemExit):
        start(killed, "--resume", f"model.teacher.checkpoint={changed}")
    assert "error: --resume: the teacher's file is not the one" in capsys.readouterr().err
    assert names(killed) == "3 5 best"


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("optimizer.lr=0.5", "optimizer.lr is 0.5, was 0.0005"),
        ("dataloader.train.total_batch_size=4", "dataloader.train.total_batch_size is 4, was 2"),
        ("dataloader.train.seed=-1", "was 0: it cannot change within a run"),
        ("train.seed=3", "dataloader.train.seed is 3, was 0"),
        ("dataloader.train.dataset.num_images=5", "the number of training images is 5, was 8"),
        ("train.max_iter=5", "has made 6 iterations, more than train.max_iter=5"),
        ("model.head.adapter=conv3x3", "does not fit the config"),
    ],
)
def test_what_cannot_change_within_a_run_is_refused(killed_at_6, start, capsys, setting, named):
    before = {path.name: path.stat().st_mtime_ns for path in killed_at_6.iterdir()}
    del before["log.txt"]
    with pytest.raises(SystemExit):
        start(killed_at_6, "--resume", setting)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --resume: ") and named in error
    after = {path.name: path.stat().st_mtime_ns for path in killed_at_6.iterdir()}
    assert {name: after[name] for name in before} == before


def test_other_accumulation_goes_on_where_the_data_was_and_says_so(straight, killed, start, caplog):
    start(killed, "--resume", "train.accumulation_steps=1")
    assert (
        "the run goes on, but may not end as it would have: train.accumulation_steps is 1, was 2"
    ) in caplog.text
    assert iterations(killed) == iterations(straight)
    assert kill_resume.differences(*map(kill_resume.state, (straight, killed)), "run")


def test_saved_config_is_the_same_run_and_some_of_it_may_change(straight, killed, teacher, caplog):
    moved = shutil.copy(teacher, killed / "moved.pth")
    free = [f"model.teacher.checkpoint={moved}", "train.checkpointer.max_to_keep=3"]
    run(str(killed / "config.yaml"), "--resume", f"train.output_dir={killed}", *free)
    assert "Resumed from" in caplog.text
    assert "--resume" not in caplog.text and "Cannot find the hook" not in caplog.text
    assert_same(killed, straight)


def test_run_without_a_seed_is_resumed_with_the_one_that_it_drew(start, tmp_path):
    folder, expected = tmp_path / "run", tmp_path / "expected"
    short = ("train.seed=-1", "train.max_iter=4", "train.eval_period=0")
    start(folder, *short)
    drawn = torch.load(folder / "model_final.pth", weights_only=True)["settings"]
    assert drawn["train.seed"] == drawn["dataloader.train.seed"] and int(drawn["train.seed"]) >= 0
    shutil.copytree(folder, expected)
    for name in ("model_final.pth", "model_0000003.pth", "summary.json"):
        (folder / name).unlink()
    start(folder, "--resume", *short)
    assert_same(folder, expected)


def test_ended_run_is_left_alone_and_a_longer_one_has_not_ended(straight, start, tmp_path):
    ended = Path(shutil.copytree(straight, tmp_path / "ended"))
    before = (ended / "summary.json").stat().st_mtime_ns
    start(ended, "--resume")
    assert (ended / "summary.json").stat().st_mtime_ns == before
    with interrupted(Killed, Trainer, "run_step", at_iteration(9)):
        start(ended, "--resume", "train.max_iter=10")
    assert not (ended / "summary.json").exists()


def test_keeping_the_last_checkpoints_never_removes_the_newest(killed, start):
    """Though one that cannot be read has a later number."""
    shutil.copy(killed / "model_0000003.pth", killed / "model_0000001.pth")
    (killed / "model_0000005.pth").write_bytes(b"")
    with interrupted(Killed, Trainer, "run_step", at_iteration(5)):
        start(killed, "--resume", "train.checkpointer.period=1", "train.checkpointer.max_to_keep=1")
    assert names(killed) == "4 5 best"
    assert (killed / "last_checkpoint").read_text() == "model_0000004.pth"


# Settings, and at which iterations the run is killed, and with how many workers it goes on then.
# FCOS's running normaliser is no buffer: a resumed one would divide by Detectron2's first guess.
# YOLOX's last three iterations are without mosaics, and have one more loss. The mosaics' sizes
# change every second iteration; they end, and the rate becomes constant, at the sixth.
OTHERS = {
    "fcos": (["train.max_iter=4", "train.checkpointer.period=2"], [(2, 0)]),
    "yolox": (["train.max_iter=6", "train.checkpointer.period=1"], [(2, 0)]),
    "mosaic": (
        [
            "train.max_iter=8",
            "train.checkpointer.period=3",
            "train.log_period=2",
            "train.val_loss.period=4",
            "train.val_loss.num_images=2",
            "optimizer.lr=1e-3",
        ],
        [(4, 0), (7, 2)],
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_detectors_go_on_exactly(data, configs, tmp_path, kind):
    settings, kills = OTHERS[kind]
    straight, folder = tmp_path / "straight", tmp_path / "killed"
    run(configs[kind], *data, *settings, f"train.output_dir={straight}")
    flags = []
    for iteration, workers in kills:
        with interrupted(Killed, Trainer, "run_step", at_iteration(iteration)):
            run(configs[kind], *flags, *data, *settings, f"train.output_dir={folder}")
        flags = ["--resume", f"dataloader.train.num_workers={workers}"]
    run(configs[kind], *flags, *data, *settings, f"train.output_dir={folder}")
    assert_same(folder, straight)
    state = torch.load(straight / "model_final.pth", weights_only=True)
    if kind == "fcos":
        assert state["loss_normalizer"] != 300
    if kind == "yolox":
        lines = [json.loads(line) for line in open(folder / "metrics.json")]
        l1 = [line["iteration"] for line in lines if "loss_l1" in line]
        assert l1 == [3, 4, 5]


def test_a_run_under_a_bare_backbone_goes_on_under_the_same(tmp_path, data, configs):
    """The teacher's own weights are in no checkpoint of the run."""
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=96, embed_dim=32, depth=2, num_heads=2, num_classes=0
    )
    torch.save(net.state_dict(), tmp_path / "vit.pth")
    weights = f"model.teacher.backbone.pretrained={tmp_path / 'vit.pth'}"
    options = [*data, weights, "train.log_period=1"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run("tests/engine/configs/backbone.py", *options, f"train.output_dir={whole}")
    options.append(f"train.output_dir={resumed}")
    with interrupted(signal.SIGTERM, Trainer, "run_step", at_iteration(1)):
        run("tests/engine/configs/backbone.py", *options)
    run("tests/engine/configs/backbone.py", "--resume", *options)
    assert_same(whole, resumed)
    assert analyse(run=str(resumed), out=str(tmp_path / "analysis"), num_pictures=0)


def test_a_run_that_is_resumed_with_what_it_has_for_its_length_is_whole(tmp_path, data, configs):
    options = [*data, f"train.output_dir={tmp_path}"]
    run(configs["student"], *options, "train.max_iter=2")
    final = (tmp_path / "model_final.pth").stat().st_mtime_ns
    with interrupted(signal.SIGTERM, Trainer, "run_step", at_iteration(2)):
        run(configs["student"], "--resume", *options, "train.max_iter=6")
    # The final checkpoint that is there is an older one.
    run(configs["student"], "--resume", *options, "train.max_iter=3")
    assert (tmp_path / "model_final.pth").stat().st_mtime_ns > final
    saved = torch.load(tmp_path / "model_final.pth", weights_only=False)
    assert saved["iteration"] == 2
    (loaded,) = load_runs({"run": str(tmp_path)})
    assert loaded.summary["iterations"] == 3

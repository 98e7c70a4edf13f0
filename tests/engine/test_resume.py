"""--resume: a run that was killed ends as the one that never was; what cannot go on is refused."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from commands import load_tool, run
from detectron2.evaluation import COCOEvaluator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dfd.engine.state import checkpoint as checkpoint_module
from dfd.engine.trainer import Trainer

pytestmark = pytest.mark.slow

kill_resume = load_tool("kill_resume")
# Everything that a run has to remember; a checkpoint after iterations 1, 3, 5 and 7.
LONG = [
    "train.max_iter=8",
    "train.log_period=3",
    "train.eval_period=5",
    "train.accumulation_steps=2",
    "train.clip_grad_norm=1",
    "train.checkpointer.max_to_keep=2",
    "model.head.warmup_iters=6",
    "model.head.adapter=conv1x1",
    "model.head.criterion.lenient=context",
]


class Killed(BaseException):
    """In place of SIGKILL, which would end the tests too."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, data, configs):
    folder = tmp_path_factory.mktemp("teacher")
    run(configs["teacher"], *data, "train.max_iter=1", f"train.output_dir={folder}")
    return folder / "model_final.pth"


@pytest.fixture(scope="module")
def start(data, configs, teacher):
    """Start the long run in a folder."""

    def call(folder, *arguments):
        flags = [a for a in arguments if a.startswith("--")]
        settings = [a for a in arguments if not a.startswith("--")]
        run(
            configs["dfd"],
            *flags,
            *data,
            *LONG,
            f"model.teacher.checkpoint={teacher}",
            f"train.output_dir={folder}",
            *settings,
        )

    return call


@pytest.fixture(scope="module")
def straight(tmp_path_factory, start):
    """The run that is never killed."""
    folder = tmp_path_factory.mktemp("straight")
    start(folder)
    return folder


@pytest.fixture(scope="module")
def killed_at_6(tmp_path_factory, start):
    """One that was killed in iteration 6; its checkpoints are those after 3 and 5."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_in(patch, Trainer, "run_step", lambda trainer: trainer.iter == 6)
        start(folder)
    assert names(folder) == ["model_0000003.pth", "model_0000005.pth"]
    return folder


@pytest.fixture
def killed(killed_at_6, tmp_path):
    """A copy of it to resume, or to do something to."""
    return Path(shutil.copytree(killed_at_6, tmp_path / "killed"))


def kill_in(patch, owner, name, when=lambda *_, **__: True, call=1):
    """Kill the run where it calls a function for the ``call``-th time with such arguments."""
    function, calls = getattr(owner, name), []

    def killing(*args, **kwargs):
        if when(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                raise Killed
        return function(*args, **kwargs)

    patch.setattr(owner, name, killing)
    without_an_end(patch)


def without_an_end(patch):
    """A killed run does nothing more, where one that fails ends its writers."""
    after_train = Trainer.after_train

    def ended(trainer):
        if not isinstance(sys.exc_info()[1], Killed):
            after_train(trainer)

    patch.setattr(Trainer, "after_train", ended)


def names(folder):
    return sorted(path.name for path in folder.glob("*.pth"))


def iterations(folder):
    return [json.loads(line)["iteration"] for line in open(folder / "metrics.json")]


def assert_same(folder, straight):
    expected, found = map(kill_resume.state, (straight, folder))
    assert kill_resume.differences(expected, found, "run") == []


def half_a_checkpoint(patch, number):
    """Kill the run when it has written half of its ``number``-th checkpoint."""
    save, calls = torch.save, []

    def half(content, file):
        calls.append(1)
        whole = io.BytesIO()
        save(content, whole)
        if len(calls) < number:
            file.write(whole.getvalue())
            return
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        raise Killed

    patch.setattr(torch, "save", half)
    without_an_end(patch)


def at_iteration(number):
    return lambda trainer: trainer.iter == number


MOMENTS = {
    "before the first checkpoint": (Trainer, "run_step", at_iteration(1)),
    "after the second checkpoint": (Trainer, "run_step", at_iteration(4)),
    "in the evaluation on the way": (COCOEvaluator, "evaluate"),
    "in the last evaluation": (COCOEvaluator, "evaluate", lambda _: True, 2),
    "before the first checkpoint is named the last": (
        checkpoint_module,
        "whole_file",
        lambda path, mode="w": os.path.basename(path) == "last_checkpoint",
    ),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_run_ends_as_the_one_never_killed(straight, start, tmp_path, moment):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_in(patch, *MOMENTS[moment])
        start(tmp_path)
    start(tmp_path, "--resume")
    assert_same(tmp_path, straight)
    assert json.loads((tmp_path / "summary.json").read_text())["iterations"] == 8


@pytest.mark.parametrize("number", [1, 3])
def test_run_killed_in_a_checkpoint_leaves_nothing_half(straight, start, tmp_path, number):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        half_a_checkpoint(patch, number)
        start(tmp_path)
    assert [path.name for path in tmp_path.glob(".*.partial")] == [
        f".model_{2 * number - 1:07d}.pth.partial"
    ]
    assert len(names(tmp_path)) == number - 1
    # Another period, so that no later checkpoint takes the same name.
    start(tmp_path, "--resume", "train.checkpointer.period=7")
    assert not list(tmp_path.glob(".*.partial"))
    assert_same(tmp_path, straight)


def test_interrupted_run_goes_on_from_its_checkpoint_not_from_what_it_logged(
    straight, start, tmp_path
):
    """One that is told to end logs all that it has done; some of it is done again."""
    step = Trainer.run_step

    def interrupted(trainer):
        step(trainer)
        if trainer.iter == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "run_step", interrupted)
        start(tmp_path)
    assert max(iterations(tmp_path)) == 4
    start(tmp_path, "--resume")
    assert_same(tmp_path, straight)


def test_each_iteration_is_logged_and_shown_once(straight, killed, start):
    # So that some of what was logged is done again.
    (killed / "model_0000005.pth").unlink()
    start(killed, "--resume")
    assert iterations(killed) == iterations(straight)
    events = EventAccumulator(str(killed)).Reload()
    for key in ("total_loss", "bbox/AP"):
        expected = EventAccumulator(str(straight)).Reload().Scalars(key)
        assert [e.step for e in events.Scalars(key)] == [e.step for e in expected]


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_truncated_last_checkpoint_is_named_and_the_one_before_it_used(
    straight, killed, start, caplog, damage
):
    last = killed / "model_0000005.pth"
    if damage == "gone":
        last.unlink()
    else:
        last.write_bytes(last.read_bytes()[:-5000])
    start(killed, "--resume")
    assert f"cannot read {last}" in caplog.text
    assert f"Resumed from {killed / 'model_0000003.pth'}" in caplog.text
    assert_same(killed, straight)


def test_checkpoints_without_the_name_of_the_last_are_found(killed, start, caplog):
    """Not begun anew over them."""
    (killed / "last_checkpoint").unlink()
    start(killed, "--resume", "train.max_iter=6")
    assert f"Resumed from {killed / 'model_0000005.pth'}" in caplog.text


@pytest.mark.parametrize("damage", ["truncated", "of another program"])
def test_no_readable_checkpoint_is_an_error_not_a_new_beginning(killed, start, capsys, damage):
    for name in names(killed):
        if damage == "truncated":
            (killed / name).write_bytes(b"PK")
        else:
            torch.save({"model": {}, "iteration": 3}, killed / name)
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
    assert names(killed) == ["model_0000003.pth", "model_0000005.pth"]


def test_teacher_file_may_move(straight, killed, start, teacher, tmp_path):
    moved = shutil.copy(teacher, tmp_path / "moved.pth")
    start(killed, "--resume", f"model.teacher.checkpoint={moved}")
    assert_same(killed, straight)


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


def test_unchanged_command_is_resumed_without_a_warning(killed, start, caplog):
    start(killed, "--resume", "train.checkpointer.max_to_keep=3")
    assert "Resumed from" in caplog.text
    assert "--resume" not in caplog.text and "Cannot find the hook" not in caplog.text


def test_saved_config_is_the_same_run(killed, start, straight, caplog):
    run(str(killed / "config.yaml"), "--resume", f"train.output_dir={killed}")
    assert "may not end" not in caplog.text
    assert_same(killed, straight)


def test_run_without_a_seed_is_resumed_with_the_one_that_it_drew(start, tmp_path):
    short = ("train.seed=-1", "train.max_iter=4", "train.eval_period=0")
    start(tmp_path, *short)
    expected = kill_resume.state(tmp_path)
    seeds = [expected["checkpoint"]["settings"][f"{k}.seed"] for k in ("train", "dataloader.train")]
    assert seeds[0] == seeds[1] and int(seeds[0]) >= 0
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "model_0000003.pth").unlink()
    (tmp_path / "summary.json").unlink()
    start(tmp_path, "--resume", *short)
    assert kill_resume.differences(expected, kill_resume.state(tmp_path), "run") == []


def test_ended_run_is_left_alone_and_a_longer_one_has_not_ended(killed, start, monkeypatch):
    start(killed, "--resume")
    before = (killed / "summary.json").stat().st_mtime_ns
    start(killed, "--resume")
    assert (killed / "summary.json").stat().st_mtime_ns == before
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_in(patch, Trainer, "run_step", at_iteration(9))
        start(killed, "--resume", "train.max_iter=10")
    assert not (killed / "summary.json").exists()


def test_keeping_the_last_checkpoints_never_removes_the_newest(killed, start):
    """Though one that cannot be read has a later number."""
    shutil.copy(killed / "model_0000003.pth", killed / "model_0000001.pth")
    (killed / "model_0000005.pth").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_in(patch, Trainer, "run_step", at_iteration(5))
        start(killed, "--resume", "train.checkpointer.period=1", "train.checkpointer.max_to_keep=1")
    assert names(killed) == ["model_0000004.pth", "model_0000005.pth"]
    assert (killed / "last_checkpoint").read_text() == "model_0000004.pth"


def test_running_normaliser_of_a_dense_detector_goes_on(data, configs, tmp_path):
    """It is no buffer, so a resumed RetinaNet or FCOS would divide by Detectron2's first guess."""
    folders = tmp_path / "straight", tmp_path / "killed"
    settings = [*data, "train.max_iter=4", "train.checkpointer.period=2", "train.eval_period=0"]
    run(configs["fcos"], *settings, f"train.output_dir={folders[0]}")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_in(patch, Trainer, "run_step", lambda trainer: trainer.iter == 2)
        run(configs["fcos"], *settings, f"train.output_dir={folders[1]}")
    run(configs["fcos"], "--resume", *settings, f"train.output_dir={folders[1]}")
    states = [torch.load(folder / "model_final.pth", weights_only=True) for folder in folders]
    assert states[0]["loss_normalizer"] == states[1]["loss_normalizer"] != 300
    torch.testing.assert_close(states[0]["model"], states[1]["model"], rtol=0, atol=0)


def test_yolox_on_mosaics_goes_on_exactly(data, configs, tmp_path):
    """Killed before its closing part, which has other images and one more loss."""
    folders = tmp_path / "straight", tmp_path / "killed"
    settings = [*data, "train.max_iter=6", "train.checkpointer.period=1"]
    run(configs["yolox"], *settings, f"train.output_dir={folders[0]}")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_in(patch, Trainer, "run_step", lambda trainer: trainer.iter == 2)
        run(configs["yolox"], *settings, f"train.output_dir={folders[1]}")
    run(configs["yolox"], "--resume", *settings, f"train.output_dir={folders[1]}")
    states = [torch.load(folder / "model_final.pth", weights_only=True) for folder in folders]
    for part in ("model", "head"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)
    averages = [state["ema"]["model"] for state in states]
    torch.testing.assert_close(*averages, rtol=0, atol=0)
    lines = [json.loads(x) for x in (folders[1] / "metrics.json").read_text().splitlines()]
    l1 = {line["iteration"]: "loss_l1" in line for line in lines if "total_loss" in line}
    assert l1 == {0: False, 1: False, 2: False, 3: True, 4: True, 5: True}

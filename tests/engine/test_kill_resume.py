"""tools/kill_resume.py: it kills, it sees a difference, it counts."""

import json

import pytest
import torch
from commands import load_tool

from dfd.engine.console import start
from dfd.errors import UserError

tool = load_tool("kill_resume")
NAN = float("nan")


def content():
    weights = torch.tensor([1.0, 0.0, NAN])
    return {"model": {"w": weights, "n": torch.tensor(3)}, "lines": [{"loss": 0.5, "ap": NAN}]}


def change(path, value):
    def apply(tree):
        *way, last = path
        for key in way:
            tree = tree[key]
        tree[last] = value

    return apply


CHANGES = {
    "run.model.w": [
        change(["model", "w"], torch.tensor([1.0, -0.0, NAN])),
        change(["model", "w"], torch.tensor([1 + 2**-23, 0.0, NAN])),
        change(["model", "w"], torch.tensor([1.0, 0.0, NAN], dtype=torch.float64)),
        change(["model", "w"], torch.tensor([[1.0, 0.0, NAN]])),
        change(["model", "w"], [1.0, 0.0, NAN]),
    ],
    "run.model.n": [change(["model", "n"], torch.tensor(4))],
    "run.model": [change(["model", "more"], 1), lambda tree: tree["model"].pop("n")],
    "run.lines.0.loss": [change(["lines", 0, "loss"], 0.5 + 2**-53)],
    "run.lines": [lambda tree: tree["lines"].append({})],
}


@pytest.mark.parametrize(("where", "apply"), [(k, f) for k, fs in CHANGES.items() for f in fs])
def test_one_bit_is_a_difference_and_is_named(where, apply):
    assert tool.differences(content(), content(), "run") == []
    changed = content()
    apply(changed)
    assert tool.differences(content(), changed, "run") == [where]


def write_run(folder, **metrics):
    folder.mkdir(parents=True)
    scalars = {key: {"values": [[value, 1]]} for key, value in metrics.items()}
    run = {"trainer": {"scalars": scalars}, "metrics_size": 7 + len(str(metrics))}
    torch.save(run, folder / "model_final.pth")
    (folder / "metrics.json").write_text(json.dumps({"iteration": 1, **metrics}) + "\n")
    return tool.state(folder)


def test_time_and_memory_are_no_difference_but_a_loss_is(tmp_path):
    runs = [
        write_run(tmp_path / "0", loss=1, data_time=0.25, peak_memory_mib=3),
        write_run(tmp_path / "1", loss=1, data_time=0.123456, peak_memory_mib=40, time=2),
        write_run(tmp_path / "2", loss=2, data_time=0.25, peak_memory_mib=3),
    ]
    assert tool.differences(runs[0], runs[1], "run") == []
    assert tool.differences(runs[0], runs[2], "run") == [
        "run.checkpoint.trainer.scalars.loss.values.0.0",
        "run.metrics.0.loss",
    ]


def test_kill_says_what_the_run_was_doing(tmp_path):
    kill = dict(folder=tmp_path, after=0.05)
    said = tool.kill(start(["sleep", "60"]), **kill, in_checkpoint=False)
    assert said.endswith("last checkpoint none")

    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    script = f"sleep 0.3; touch {tmp_path}/.model_0000005.pth.partial; sleep 60"
    said = tool.kill(start(["sh", "-c", script]), **kill, in_checkpoint=True)
    assert said.endswith("while it wrote model_0000005.pth, last checkpoint model_0000002.pth")


def test_a_run_that_ended_before_was_not_killed(tmp_path):
    kill = dict(folder=tmp_path, after=60, in_checkpoint=False)
    assert tool.kill(start(["true"]), **kill) is None
    with pytest.raises(UserError, match="failed with exit code 1"):
        tool.kill(start(["false"]), **kill)


@pytest.fixture
def call(monkeypatch, tmp_path):
    """The tool with runs that only sleep or end, and with states that are given."""

    def call(*states):
        left = list(states)

        def launch(args, folder, *flags):
            folder.mkdir(exist_ok=True)
            whole = folder.name == "whole" or flags
            return start(["sleep", "0.2" if whole else "60"])

        monkeypatch.setattr(tool, "launch", launch)
        monkeypatch.setattr(tool, "state", lambda folder: left.pop(0))
        monkeypatch.setattr(tool, "stop_on_signals", lambda: None)
        # Every third kill waits for a checkpoint, which these runs do not write.
        times = ["--times", str(len(states) - 1)]
        monkeypatch.setattr("sys.argv", ["kill_resume.py", "--out", str(tmp_path / "out"), *times])
        with pytest.raises(SystemExit) as end:
            tool.main()
        return end.value.code

    return call


def test_runs_are_counted_and_one_that_differs_is_kept(call, capsys, tmp_path):
    assert call({"w": 1}, {"w": 1}, {"w": 2}) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "1 of 2 identical"
    assert lines[-3].startswith("1 of 2: killed after ") and lines[-3].endswith(": identical")
    assert lines[-2].endswith(": DIFFERENT in run.w")
    assert not (tmp_path / "out" / "killed_001").exists()
    assert (tmp_path / "out" / "killed_002").exists()


def test_all_identical_is_success_and_a_used_folder_is_refused(call, capsys):
    assert call({"w": 1}, {"w": 1}) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 1 identical"
    assert "is not empty" in call({"w": 1}, {"w": 1})

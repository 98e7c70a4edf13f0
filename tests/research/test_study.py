"""The study's command and lists of methods; the runs themselves are those of dfd ablate."""

import functools
import runpy
from collections import Counter
from pathlib import Path

import pytest

from dfd.engine.config.load import ConfigFile

pytestmark = pytest.mark.slow


@pytest.fixture
def tool(monkeypatch):
    """``tools/<name>.py`` in this process."""
    monkeypatch.setattr("dfd.engine.console.stop_on_signals", lambda: None)
    monkeypatch.setattr("dfd.research.ablate.command.stop_on_signals", lambda: None)

    def call(name, *arguments):
        monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(f"tools/{name}.py", run_name="__main__")

    return call


@pytest.mark.parametrize(
    ("name", "command"),
    [("ablate",) * 2, ("analyse_disparity", "analyse"), ("demo",) * 2, ("report",) * 2],
)
def test_a_tool_s_old_name_is_the_command(tool, name, command, capsys):
    with pytest.raises(SystemExit) as stop:
        tool(name, "--help")
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: dfd {command} ")


@pytest.mark.parametrize("setting", ["bccd", "shapes"])
def test_every_method_is_a_cell_and_its_settings_exist(tool, setting, tmp_path, capsys):
    folder = f"configs/study_{setting}"
    arguments = ["--config-file", f"{folder}/dfd.py", "--out", tmp_path / "out", "--list"]
    tool("ablate", f"@{folder}/methods.txt", "--seeds", "1:6", *arguments)
    said = capsys.readouterr().out
    assert said.startswith("40 runs: 8 cells")
    for method in ("none", "inherit", "mimic", "cwd", "pkd", "mgd", "fgd", "dfd"):
        assert f"\n{method} (" in said


@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet", "reppoints", "yolox"])
def test_every_family_has_its_teachers(tool, family, tmp_path, capsys):
    arguments = ["--seeds", "0:5", "--out", tmp_path / "out", "--list"]
    tool("ablate", f"@configs/study_families/{family}.txt", *arguments)
    said = capsys.readouterr().out
    assert said.startswith("15 runs: 3 cells")
    assert "\nplain (" in said and "\nown (" in said and "\nother (" in said


PAIRS = ["faster_rcnn", "retinanet", "reppoints", "yolox", "vit"]


def test_what_would_be_run(tool, tmp_path, monkeypatch, capsys):
    """Every command of every setting can be parsed, and its keys are there."""
    commands = []

    def call(command):
        commands.append(command)
        if "train" in command:
            key = "train.output_dir="
            teacher = Path(next(c for c in command if c.startswith(key)).removeprefix(key))
            teacher.mkdir(parents=True)
            (teacher / "summary.json").touch()
        out = Path(command[command.index("--out") + 1]) if "--out" in command else None
        if out:
            # The seeds of a cell differ in nothing else, and each is resolved by itself.
            tool("ablate", *command[command.index("ablate") + 1 :], "--seeds", "0", "--list")
            out.mkdir(parents=True)
            row = "plain,0,done,30.123,50,20\nplain,1,not run,,,\n"
            (out / "results.csv").write_text("cell,seed,status,AP,AP50,AP75\n" + row)

    class Process:
        def __init__(self, command, **settings):
            call(command)

        def wait(self):
            return 0

    monkeypatch.setattr("dfd.engine.console.start", Process)
    monkeypatch.setattr("dfd.engine.console.end", lambda process: None)
    # Two settings share a config.
    monkeypatch.setattr("dfd.research.ablate.command.ConfigFile", functools.cache(ConfigFile))
    photos = ["--photos", tmp_path, "--yolox-nano", tmp_path / "nano.pth"]
    for name in ("train.json", "val.json", "images", "nano.pth", "lite0.pth"):
        (tmp_path / name).touch()
    photos += ["--lite0", tmp_path / "lite0.pth"]
    tool("study", "--bccd", tmp_path, "--out", tmp_path / "out", *photos)
    said = capsys.readouterr().out
    trained = [c for c in commands if "train" in c]
    assert len(trained) == 6 and len(commands) == 6 + 2 + 2 * len(PAIRS) + 3 + 4 + 5 + 3
    assert said.count("\n8 runs: 8 cells") == 2
    assert said.count("\n7 runs: 7 cells") == 3 + 4 + len(PAIRS)
    assert said.count("\n5 runs: 5 cells") == len(PAIRS)
    # Four families on photographs, and one with a tenth of the labels.
    assert said.count("\n4 runs: 4 cells") == 4 + 3 and said.count("\n3 runs: 3 cells") == 1
    seeds = Counter(c[c.index("--seeds") + 1] for c in commands if "--seeds" in c)
    assert seeds == {"1:6": 2, "0:3": 2 * len(PAIRS), "0:5": 2 + 5 + 3 + 4, "0:10": 1}
    assert said.count(f"pretrained={tmp_path / 'lite0.pth'}") == 5 + 3
    rates = [c for c in commands if any(part.startswith("optimizer.lr=") for part in c)]
    assert len(rates) == 4 + 3
    for command in commands:
        if "study_families/dfd" in " ".join(command) and "own_" not in command[-1]:
            assert "teachers.bccd.checkpoint" in command[-1]
            assert command[-1].endswith("leniency/teacher/model_final.pth")
    rows = (tmp_path / "out" / "study.csv").read_text().splitlines()
    families = [f"{cells}_{pair}" for cells in ("leniency", "criteria") for pair in PAIRS]
    own = [f"own_{pair}" for pair in ("retinanet", "faster_rcnn", "vit")]
    settings = ["bccd", "shapes", *families, *own]
    settings += [f"best_rate_{pair}" for pair in PAIRS[:4]]
    settings += [f"photos_{name}" for name in (*PAIRS[:4], "few_labels")]
    settings += [f"photos_best_rate_{pair}" for pair in ("faster_rcnn", "retinanet", "yolox")]
    assert rows[1:] == [f"{setting},plain,0,30.12,50.00,20.00" for setting in settings]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bccd", "absent"], "--bccd absent: no such folder"),
        (["--setting", "photos"], "--photos is missing: it must be a folder"),
        (["--bccd", "tests", "--photos", "tests"], "--photos tests: it must be a folder"),
    ],
)
def test_missing_data_are_told_before_anything_is_trained(tool, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as stop:
        tool("study", *arguments, "--out", tmp_path / "out")
    assert str(stop.value).startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()

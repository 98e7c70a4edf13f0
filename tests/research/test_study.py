"""The study's command and lists of methods; the runs themselves are those of dfd ablate."""

import runpy

import pytest

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


def test_missing_data_are_told_before_anything_is_trained(tool, tmp_path):
    with pytest.raises(SystemExit) as stop:
        tool("study", "--bccd", tmp_path / "absent", "--out", tmp_path / "out")
    assert str(stop.value).startswith(f"error: --bccd {tmp_path / 'absent'}: no")
    assert not (tmp_path / "out").exists()

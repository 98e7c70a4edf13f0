"""The installed package: its command, and the configs that come with it."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from dfd.cli import COMMANDS, main
from dfd.engine.config import find
from dfd.engine.config.find import find_config
from dfd.engine.config.load import load_config

ROOT = Path(__file__).parents[1]
LIST = (
    "from distutils.core import run_setup; d = run_setup('setup.py', stop_after='init'); "
    "print(*(f'{p} {d.package_dir.get(p)}' for p in d.packages), sep='\\n')"
)


def test_every_package_and_every_config_is_installed():
    code = f"import setuptools; {LIST}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    packages = dict(line.split() for line in result.stdout.splitlines())
    code = {path.parent for path in (ROOT / "projects" / "dfd").rglob("*.py")}
    for path in code:
        assert ".".join(path.relative_to(ROOT / "projects").parts) in packages
    for path in (ROOT / "configs").rglob("*.*"):
        if "__pycache__" not in path.parts:
            folder = path.parent.relative_to(ROOT)
            assert packages[".".join(("dfd", *folder.parts))] == str(folder), path


def test_a_config_of_the_package_is_found_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("configs/demo/student.py", "demo/student.py"):
        assert Path(find_config(path)).samefile(ROOT / "configs/demo/student.py")
    assert load_config("configs/demo/student.py").train.max_iter > 0
    assert find_config("configs/demo/absent.py") == "configs/demo/absent.py"


def test_a_file_of_ones_own_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "configs" / "demo" / "student.py"
    own.parent.mkdir(parents=True)
    own.touch()
    assert find_config("configs/demo/student.py") == "configs/demo/student.py"
    monkeypatch.setattr(find, "_PLACES", (tmp_path,))
    assert find_config(str(own)) == str(own)


def test_the_command_tells_what_there_is(capsys):
    main([])
    said = capsys.readouterr().out
    assert all(f"dfd {name} " in said for name in COMMANDS)
    with pytest.raises(SystemExit, match="error: dfd trian: no such command; there are train, "):
        main(["trian"])


def test_the_command_tells_its_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"dfd {metadata.version('dfd')}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_tells_its_arguments(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert "usage: " in capsys.readouterr().out

"""The study's command and lists of methods; the runs themselves are those of tools/ablate.py."""

import os
import subprocess
import sys

import pytest


def tool(name, *arguments):
    return subprocess.run(
        [sys.executable, f"tools/{name}.py", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("setting", ["bccd", "shapes"])
def test_every_method_is_a_cell_and_its_settings_exist(setting, tmp_path):
    folder = f"configs/study_{setting}"
    arguments = ["--config-file", f"{folder}/dfd.py", "--out", str(tmp_path / "out"), "--list"]
    process = tool("ablate", f"@{folder}/methods.txt", "--seeds", "1:6", *arguments)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("40 runs: 8 cells")
    for method in ("none", "inherit", "mimic", "cwd", "pkd", "mgd", "fgd", "dfd"):
        assert f"\n{method} (" in process.stdout


def test_missing_data_are_told_before_anything_is_trained(tmp_path):
    process = tool("study", "--bccd", str(tmp_path / "absent"), "--out", str(tmp_path / "out"))
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith(f"error: --bccd {tmp_path / 'absent'}: no")
    assert not (tmp_path / "out").exists()

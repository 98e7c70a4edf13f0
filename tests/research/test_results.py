"""What docs/results holds: every published run has a line that says how it was made."""

import csv
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


def read(name):
    with open(RESULTS / name, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


MANIFEST = read("manifest.csv")
FILES = sorted({row["file"] for row in MANIFEST})


@pytest.mark.parametrize("file", FILES)
def test_every_run_is_in_the_manifest_once(file):
    told = Counter(
        (row["student"], cell, seed)
        for row in MANIFEST
        if row["file"] == file
        for cell in row["cells"].split()
        for seed in row["seeds"].split()
    )
    runs = Counter((row["student"], row["cell"], row["seed"]) for row in read(file))
    assert runs and told == runs


def test_what_the_manifest_names_is_there():
    assert len(FILES) >= 5
    for row in MANIFEST:
        assert (ROOT / row["config"]).is_file(), row
        assert row["teacher"].startswith("published") or (ROOT / row["teacher"]).is_file(), row
        assert row["commit"] and row["teacher sha256"] and row["precision"] in ("fp32", "bf16")

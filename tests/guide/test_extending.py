"""docs/extending.md: the files on the page are written out as they are there, and run."""

import csv
import json
import re
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
FILES = dict(
    re.findall(r"^`(\w+\.py)`[^\n]*:\n\n```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
)
COMMANDS = re.findall(
    r"^    PYTHONPATH=\. dfd train --config-file (\w+)\.py$", PAGE.read_text(), re.M
)
SMALL = [
    "train.device=cpu",
    "train.max_iter=2",
    "train.log_period=1",
    "train.disparity_images.period=0",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
]
SHAPES = [
    "dataloader.train.dataset.root=shapes",
    "dataloader.train.dataset.image_size=64",
    "dataloader.train.dataset.num_train=8",
    "dataloader.train.dataset.num_val=2",
    "dataloader.train.dataset.num_images=4",
]
RANDOM_TEACHER = ["model.teacher.checkpoint=", "model.teacher.allow_random=True"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The page's files in a folder of their own, which is where the commands are given."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in FILES:
        sys.modules.pop(Path(name).stem, None)


def write_tables(folder):
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for split in ("train", "test"):
        with open(folder / f"{split}.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", "x0", "y0", "x1", "y1", "class"])
            for i in range(3):
                image = f"{split}{i}.png"
                pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                cv2.imwrite(str(folder / "images" / image), pixels)
                table.writerow([image, 5, 6, 40, 41, "circle"])
                table.writerow([image, 20, 10, 60, 50, "cross"])


def metrics(output):
    return [json.loads(line) for line in Path(output, "metrics.json").read_text().splitlines()]


def test_every_file_of_the_page_is_run():
    used = {f"{name}.py" for name in COMMANDS} | {"script.py"}
    assert {name for name in FILES if not name.startswith("own_")} == used
    assert len(FILES) == 2 * len(COMMANDS) + 1 == 11


@pytest.mark.parametrize("name", COMMANDS)
def test_config_of_the_page_trains(name, folder):
    from dfd.engine import load_config, train

    write_tables(folder / "data")
    overrides = SMALL if name == "dataset" else [*SMALL, *SHAPES, *RANDOM_TEACHER]
    cfg = load_config(f"{name}.py", overrides)
    results = train(cfg)
    assert "AP" in results["bbox"]
    logged = metrics(cfg.train.output_dir)
    expected = {
        "criterion": "distance",
        "adapter": "loss_dfd_p3",
        "detector": "loss_box",
        "dataset": "loss_rpn_cls",
        "hook": "weight_norm",
    }[name]
    assert any(expected in key for key in logged[0]), sorted(logged[0])


def test_script_of_the_page(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", *SMALL, *SHAPES])
    runpy.run_path("script.py", run_name="__main__")
    trained, again = capsys.readouterr().out.split()[-2:]
    assert trained == again

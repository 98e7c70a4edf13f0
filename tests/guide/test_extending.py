"""docs/extending.md: every file of the page, as it is written there, in a run of two steps."""

import csv
import json
import re
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import instantiate

import dfd.engine
from dfd import FrozenTeacher
from dfd.engine import argument_parser, load_config, main

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
FILES = dict(re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```", PAGE.read_text(), re.M | re.S))
TINY = [
    "model.teacher.checkpoint=",
    "model.teacher.allow_random=True",
    "train.device=cpu",
    "train.amp.enabled=False",
    "train.max_iter=2",
    "train.log_period=1",
    "train.disparity_images.period=0",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "dataloader.train.total_batch_size=2",
]
SHAPES = [
    "dataloader.train.dataset.image_size=64",
    "dataloader.train.dataset.num_train=4",
    "dataloader.train.dataset.num_images=4",
    "dataloader.train.dataset.num_val=2",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files of the page in the current folder, from which modules are imported."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def run(config, *arguments):
    main(argument_parser().parse_args(["--config-file", config, *TINY, *arguments]))


def metrics(folder):
    """What was logged of the steps, and of the evaluation at the end."""
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [row for row in rows if "total_loss" in row], rows[-1]


def test_the_page_holds_all_the_files():
    parts = {"criterion", "adapter", "detector", "dataset", "hook"}
    assert {f"config_{part}.py" for part in parts} | {"script.py"} < set(FILES)
    for part in parts:
        assert f"--config-file config_{part}.py" in PAGE.read_text()


def test_criterion(folder):
    run("config_criterion.py", *SHAPES)
    last = metrics(folder / "output" / "cosine")[0][-1]
    for level in ("p2", "p3", "p4", "p5"):
        assert 0 < last[f"dfd/{level}/distance"] < 2


def test_adapter(folder):
    run("config_adapter.py", *SHAPES)
    weights = torch.load(folder / "output" / "mlp_adapter" / "model_final.pth", weights_only=True)
    # The third of its layers, which none of the built-in ones for these channels has.
    assert any(re.fullmatch(r"adapters\.p\d\.2\.weight", key) for key in weights["head"])


def test_detector(folder):
    run("config_detector.py", *SHAPES)
    last = metrics(folder / "output" / "one_level")[0][-1]
    assert last["loss_dfd_p4"] > 0 and "loss_dfd_p3" not in last
    # It keeps its pixel mean among its weights; what it has learnt can be evaluated, and teach.
    weights = folder / "output" / "one_level" / "model_final.pth"
    run("config_detector.py", *SHAPES, "--eval-only", f"train.init_checkpoint={weights}")
    with torch.no_grad():
        student = load_config("config_detector.py").model.student
        student.num_classes = 3
        detector = instantiate(student)
        FrozenTeacher(model=detector, checkpoint=str(weights))


def test_the_detector_learns(folder):
    """It is an example, but no fake."""
    import one_level_detector as module

    torch.manual_seed(0)
    model = module.OneLevelDetector(backbone=module.OneLevel(32), num_classes=2)
    image = torch.full((3, 64, 64), 90, dtype=torch.uint8)
    image[:, 10:40, 20:50] = 220
    objects = module.Instances((64, 64))
    objects.gt_boxes = module.Boxes(torch.tensor([[20.0, 10.0, 50.0, 40.0]]))
    objects.gt_classes = torch.tensor([1])
    batch = [{"image": image, "instances": objects, "height": 128, "width": 128}] * 2
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        sum(model(batch).values()).backward()
        optimizer.step()
    found = model.train(False)(batch)[0]["instances"]
    assert found.pred_classes[0] == 1
    expected = torch.tensor([40.0, 20.0, 100.0, 80.0])
    torch.testing.assert_close(found.pred_boxes.tensor[0], expected, atol=8.0, rtol=0)


def test_dataset(folder):
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for split in ("train", "test"):
        with open(f"{split}.csv", "w", newline="") as f:
            table = csv.writer(f)
            table.writerow(["image", "class", "x0", "y0", "x1", "y1"])
            for i in range(3):
                image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                cv2.imwrite(str(folder / "pictures" / f"{split}{i}.png"), image)
                for kind in ("circle", "cross"):
                    table.writerow([f"{split}{i}.png", kind, 8 * i, 10, 30 + i, 44])
    run("config_dataset.py")
    _, last = metrics(folder / "output" / "csv")
    assert {"bbox/AP-circle", "bbox/AP-triangle", "bbox/AP-cross"} <= set(last)


def test_hook(folder):
    run("config_hook.py", *SHAPES)
    steps, _ = metrics(folder / "output" / "hook")
    assert len(steps) == 2 and all(row["student_weight_norm"] > 0 for row in steps)


def test_script(folder, capsys, monkeypatch):
    load = dfd.engine.load_config
    monkeypatch.setattr(
        dfd.engine, "load_config", lambda path, given: load(path, [*given, *TINY, *SHAPES])
    )
    runpy.run_path("script.py", run_name="__main__")
    said = capsys.readouterr().out.splitlines()
    trained, evaluated = (float(line) for line in said if re.fullmatch(r"nan|[\d.e-]+", line))
    assert trained == pytest.approx(evaluated, nan_ok=True)
    assert (folder / "output" / "script" / "model_final.pth").exists()

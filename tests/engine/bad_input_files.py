"""The files that the cases of bad_input.txt are made of: good ones, and each way to spoil them."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
from pathlib import Path

import cv2
import evil
import numpy as np
import torch
from coco_files import CLASSES, write_coco
from commands import run
from detectron2.config import instantiate
from toys import faster_rcnn_config

CONFIG_FILES = {
    "syntax.py": "model = dict(\n",
    "imports.py": "import absent_package\n",
    "relative.py": "from .absent import model\n",
    "fails.py": "size = 3\nmodel = unknown_name\n",
    "no_model.py": "train = dict(max_iter=1)\n",
    "damaged.yaml": "model: [1\n",
    "list.yaml": "- 1\n",
    "evil.yaml": "model: !!python/object/apply:os.system ['touch pwned']\n",
    "gone.yaml": "model: {_target_: dfd.absent.Thing}\n"
    "dataloader: {train: {dataset: x}, test: {dataset: x}}\n"
    "optimizer: {}\n"
    "lr_multiplier: {}\n"
    "train: {output_dir: x, max_iter: 1, device: cpu, amp: {enabled: false}}\n",
    "notes.txt": "my notes\n",
}
WIDTHS = {
    "stem.out_channels": 6,
    "stages.0.in_channels": 6,
    "stages.0.out_channels": 6,
    "stages.1.in_channels": 6,
    "stages.1.out_channels": 12,
    "stages.2.in_channels": 12,
    "stages.2.out_channels": 24,
    "stages.3.in_channels": 24,
    "stages.3.out_channels": 48,
}


def make_files(folder: Path, config: str) -> dict[str, str]:
    """Write all of them; returns what the names in bad_input.txt stand for."""
    for name, content in CONFIG_FILES.items():
        (folder / name).write_text(content)
    names = make_data(folder)
    make_weights(folder)
    names["GOOD"] = f"{names['DATA']} model.teacher.checkpoint={folder}/teacher.pth"
    run(config, *shlex.split(names["GOOD"]), "train.max_iter=2", f"train.output_dir={folder}/run")
    bottom_up = "model.student.backbone.bottom_up"
    return names | {
        "F": str(folder),
        "OS": os.system.__module__,
        "NARROW": " ".join(f"{bottom_up}.{key}={value}" for key, value in WIDTHS.items()),
    }


def make_data(folder: Path) -> dict[str, str]:
    def overrides(name: str, classes: list[str], splits: tuple[str, ...]) -> str:
        return shlex.join(
            f"dataloader.{split}.{override}"
            for split in splits
            for override in write_coco(folder, f"{name}_{split}", 4, classes=classes)
        )

    both = ("train", "test")
    names = {
        "DATA": overrides("good", CLASSES, both),
        "LETTERS": overrides("letters", list("abcde"), both),
        "LETTERS_TEST": overrides("letters_alone", list("abcde"), ("test",)),
        "RENAMED": overrides("renamed", ["disc", "bar", "box"], both),
    }
    good = json.loads((folder / "good_train.json").read_text())
    outside = [{**item, "bbox": [500, 500, 10, 10]} for item in good["annotations"]]
    for name, change in {
        "empty": {"images": [], "annotations": []},
        "twice": {"categories": good["categories"] + good["categories"][:1]},
        "unknown": {"categories": good["categories"][:1]},
        "outside": {"annotations": outside},
        "fraction": {"categories": [{**c, "id": c["id"] + 0.5} for c in good["categories"]]},
        "nameless": {"categories": [{**c, "name": None} for c in good["categories"]]},
        "crowd": {"annotations": [{**item, "iscrowd": "some"} for item in good["annotations"]]},
        "no_id": {"images": [{**image, "id": None} for image in good["images"]]},
        "same_id": {"images": good["images"] + [{**good["images"][0], "id": "1"}]},
        "no_size": {"images": [{**i, "width": 0, "file_name": "x"} for i in good["images"]]},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(good | change))
    (folder / "list.json").write_text("[]")
    (folder / "gbk.json").write_bytes(json.dumps(good).replace("disc", "盘").encode("gbk"))
    for name in ("damaged", "deep", "larger", "spelt"):
        (folder / name).mkdir()
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / "voc" / name).mkdir(parents=True)
    (folder / "voc/ImageSets/Main/test.txt").touch()
    (folder / "voc/ImageSets/Main/flags.txt").write_text("a 1\n")
    for name in ("a", "a 1"):
        (folder / f"voc/Annotations/{name}.xml").touch()
    for ending in ("PNG", "Png"):
        (folder / f"spelt/0.{ending}").touch()
    for i in range(4):
        (folder / f"damaged/{i}.png").write_bytes(b"no image")
        cv2.imwrite(str(folder / f"larger/{i}.png"), np.zeros((70, 90, 3), np.uint8))
        cv2.imwrite(str(folder / f"deep/{i}.png"), np.full((64, 80), 3000, np.uint16))
    return names


def make_weights(folder: Path) -> None:
    torch.manual_seed(1)
    teacher = instantiate(faster_rcnn_config(channels=12)).state_dict()
    student = instantiate(faster_rcnn_config()).state_dict()
    partly = {key: value for key, value in teacher.items() if key != "backbone.fpn_output3.weight"}
    rgb = torch.tensor([123.675, 116.28, 103.53])
    for name, content in {
        "teacher": {"model": teacher, "class_names": CLASSES},
        "teacher2": {"model": teacher, "class_names": CLASSES, "iteration": 7},
        "student": {"model": student, "class_names": CLASSES},
        "nameless": {"model": student},
        "partly": {"model": partly},
        "mean": {"model": teacher | {"pixel_mean": rgb}},
        "list": [rgb],
    }.items():
        torch.save(content, folder / f"{name}.pth")
    for ending in ("pth", "pkl", "safetensors"):
        spoilt = (folder / "teacher.pth").read_bytes()[:1000]
        (folder / f"damaged.{ending}").write_bytes(spoilt)
    backbone = {"model": {}, "__author__": "torchvision", "matching_heuristics": True}
    for name, content in {
        "imagenet": backbone,
        "list": [1],
        "caffe2": {"blobs": {"conv1_w": evil.Evil()}},
    }.items():
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(content))
    evil.write(folder / "evil.pth", evil.Evil())
    evil.write(folder / "evil.pkl", evil.Evil())
    shutil.copy(folder / "evil.pth", folder / "evil.pyth")


def make_state(state: str, given: Path, out: Path) -> None:
    """Leave in the output folder what a case finds there; most find a run of two iterations."""
    if state == "file":
        out.write_text("precious")
        return
    if state in ("checkpoint", "metrics"):
        out.mkdir()
        name = {"checkpoint": "model_0000999.pth", "metrics": "metrics.json"}[state]
        (out / name).write_text("precious")
        return
    shutil.copytree(given / "run", out)
    last = out / (out / "last_checkpoint").read_text()
    if state == "malicious":
        evil.write(last, evil.Evil())
        return
    for path in out.glob("*.pth"):
        if state == "damaged":
            path.write_bytes(path.read_bytes()[:1000])
        elif state == "gone":
            path.unlink()
        elif state == "list":
            torch.save([1], path)
        elif state == "weights":
            torch.save({"model": torch.load(path, weights_only=True)["model"]}, path)

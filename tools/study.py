#!/usr/bin/env python
"""Repeat the studies of docs/results.md: teachers, every cell over several seeds, the tables.

    python tools/study.py --bccd path/to/BCCD [--out output/study] [--parallel 2]

In each setting the teacher is trained unless it is there, then dfd ablate runs the cells under it;
the same command continues what was stopped. The runs of all settings go into <out>/study.csv.

The settings "photos" and "photos_best_rate" have a published teacher: they take --photos, a folder
with train.json and val.json in COCO form and images/, and --yolox-nano, that teacher's weights;
without a network also --lite0, timm's weights of the students' trunks.
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# torch's own, on import; nothing that a user of the study can act on.
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")

from dfd.engine.config.grammar import override  # noqa: E402
from dfd.engine.console import (  # noqa: E402
    end,
    ending_in_one_line,
    say,
    start,
    stop_on_signals,
)
from dfd.errors import UserError  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
DFD = (sys.executable, "-m", "dfd")
COLUMNS = ("setting", "method", "seed", "AP", "AP50", "AP75")


@dataclass(frozen=True)
class Ablation:
    """Cells over one config. Files are below configs/."""

    cells: str
    config: str
    checkpoint: str = "model.teacher.checkpoint"  # the key of the teacher's
    overrides: tuple[str, ...] = ()
    trunk: str = ""  # the key of the weights of the student's pretrained trunk


@dataclass(frozen=True)
class Setting:
    """A teacher, by its config below configs/ (none: its weights are published), and its runs."""

    teacher: str
    seeds: str
    ablations: dict[str, Ablation]  # by the name of its folder
    overrides: tuple[str, ...]  # of teacher and ablations
    teacher_of: str = ""  # the settings that share it; default: the setting's own name


# In 400 iterations, as the others have, RepPoints learns its rarest class or does not, by chance.
_FAMILIES: dict[str, tuple[str, ...]] = {
    "faster_rcnn": (),
    "retinanet": (),
    "reppoints": ("train.max_iter=800",),
    "yolox": (),
}


# BCCD, chosen on its validation split.
ON_TRAIN = (
    "dataloader.train.dataset.split=train",
    "dataloader.test.dataset.split=val",
    "train.amp.enabled=auto",
)


# At which the plain student is best; the configs have 5e-4, which is the ViT's.
_BCCD_RATES = {"faster_rcnn": 4e-3, "retinanet": 2e-3, "reppoints": 8e-3, "yolox": 8e-3}
_PHOTO_RATES = {"faster_rcnn": 6e-4, "retinanet": 6e-4, "yolox": 1.2e-3}


def _convolutional(cells: str, rates: Mapping[str, float]) -> dict[str, Ablation]:
    """Cells for a student of each family of CNNs under the CNN teacher of BCCD."""
    return {
        family: Ablation(
            cells,
            f"study_families/dfd_{family}.py",
            "teachers.bccd.checkpoint",
            (
                "model.teacher=${teachers.bccd}",
                "model.head.gradient_share=1",
                *length,
                *_at(rates.get(family)),
            ),
        )
        for family, length in _FAMILIES.items()
    }


def _at(rate: float | None) -> list[str]:
    return [] if rate is None else [override("optimizer.lr", rate)]


def _five_families(cells: str) -> Setting:
    """Cells for a student of each family under the CNN teacher of BCCD, on its validation split."""
    ablations = _convolutional(cells, {})
    ablations["vit"] = Ablation(cells, "study_share/dfd_cnn_vit.py")
    return Setting("bccd/teacher.py", "0:3", ablations, ON_TRAIN, teacher_of="leniency")


def _own_kind(family: str, seeds: str) -> Setting:
    """The criteria for a student of a family under a teacher of the same."""
    ablation = Ablation(
        "study_share/criteria.txt",
        f"study_families/dfd_{family}.py",
        f"teachers.{family}.checkpoint",
        (f"model.teacher=${{teachers.{family}}}", "model.head.gradient_share=1"),
    )
    overrides = ("train.amp.enabled=auto",)
    return Setting(f"study_families/teacher_{family}.py", seeds, {"criteria": ablation}, overrides)


def _own_vit() -> Setting:
    """The criteria for a ViT student under a ViT teacher."""
    ablation = Ablation("study_share/criteria.txt", "study_share/dfd_vit_vit.py")
    return Setting("bccd/teacher_vit.py", "0:5", {"criteria": ablation}, ON_TRAIN)


def _photos(rates: Mapping[str, float] | None = None) -> Setting:
    """Persons on photographs, students over a pretrained trunk under a published teacher."""
    bottom_up = "model.student.backbone.bottom_up.pretrained"
    trunks = dict.fromkeys(_FAMILIES, bottom_up) | {"yolox": "model.student.trunk.pretrained"}
    ablations = {
        family: Ablation(
            "study_photos/criteria.txt",
            f"study_photos/dfd_{family}.py",
            overrides=tuple(_at((rates or {}).get(family))),
            trunk=trunks[family],
        )
        for family in rates or _FAMILIES
    }
    if rates is None:
        ablations["few_labels"] = Ablation(
            "study_photos/few_labels.txt",
            "study_photos/dfd_unlabelled_faster_rcnn.py",
            trunk=bottom_up,
        )
    persons = [f"dataloader.{split}.dataset.classes=[person]" for split in ("train", "test")]
    # In fp32 on every processor, as the tables are.
    settings = (*persons, "train.max_iter=300", "train.amp.enabled=False")
    return Setting("", "0:5", ablations, settings)


SETTINGS = {
    # Of the final tables they are the test split, and images that were not tuned on.
    "bccd": Setting(
        "study_bccd/teacher.py",
        "1:6",
        {"methods": Ablation("study_bccd/methods.txt", "study_bccd/dfd.py")},
        ("dataloader.test.dataset.split=test",),
    ),
    "shapes": Setting(
        "study_shapes/teacher.py",
        "1:6",
        {"methods": Ablation("study_shapes/methods.txt", "study_shapes/dfd.py")},
        ("dataloader.test.dataset.seed=0",),
    ),
    "leniency": _five_families("study_share/leniency.txt"),
    "criteria": _five_families("study_share/criteria.txt"),
    "own_retinanet": _own_kind("retinanet", "0:5"),
    "own_faster_rcnn": _own_kind("faster_rcnn", "0:10"),
    "own_vit": _own_vit(),
    "best_rate": Setting(
        "bccd/teacher.py",
        "0:5",
        _convolutional("study_share/criteria.txt", _BCCD_RATES),
        ON_TRAIN,
        teacher_of="leniency",
    ),
    "photos": _photos(),
    "photos_best_rate": _photos(_PHOTO_RATES),
}
PHOTOS = {"photos", "photos_best_rate"}


def call(command: list[str]) -> None:
    """Run a command to its end.

    Raises:
        UserError: it failed; it has said why.
    """
    say(f"$ {shlex.join(command)}")
    # One thread a run: the table's numbers depend on it.
    process = start(command, output=None, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        code = process.wait()
    finally:
        end(process)
    if code:
        raise UserError(f"the command above failed with exit code {code}")


def data_overrides(setting: str, args: argparse.Namespace) -> list[str]:
    """Where a setting's data are."""
    if setting == "shapes":
        keys = ("dataloader.train.dataset.root", "dataloader.test.dataset.root")
        return [override(key, Path(args.shapes)) for key in keys]
    if setting in PHOTOS:
        return [
            override(f"dataloader.{split}.dataset.{key}", Path(args.photos) / name)
            for split, labels in (("train", "train.json"), ("test", "val.json"))
            for key, name in (("json", labels), ("images", "images"))
        ]
    return [override("dataloader.train.dataset.root", Path(args.bccd))]


def run_setting(setting: str, args: argparse.Namespace) -> list[dict[str, str]]:
    """Teacher and ablations of one setting; the rows of their runs."""
    what, out = SETTINGS[setting], Path(args.out) / setting
    data = [*data_overrides(setting, args), *what.overrides]
    configs = Path(os.path.relpath(ROOT / "configs"))
    weights = Path(args.yolox_nano)
    if what.teacher:
        teacher = Path(args.out) / (what.teacher_of or setting) / "teacher"
        weights = teacher / "model_final.pth"
        if not (teacher / "summary.json").is_file():
            command = [*DFD, "train", "--config-file", str(configs / what.teacher)]
            command += ["--resume"] if (teacher / "last_checkpoint").is_file() else []
            call([*command, override("train.output_dir", teacher), *data])
    rows = []
    for name, ablation in what.ablations.items():
        command = [*DFD, "ablate", f"@{configs / ablation.cells}"]
        command += ["--config-file", str(configs / ablation.config), "--out", str(out / name)]
        command += ["--seeds", args.seeds or what.seeds, "--parallel", str(args.parallel)]
        # Where the teacher is chosen goes before what is set in it.
        paths = [override(ablation.checkpoint, weights)]
        if ablation.trunk and args.lite0:
            paths.append(override(ablation.trunk, Path(args.lite0)))
        call([*command, *data, *ablation.overrides, *paths])
        label = setting if len(what.ablations) == 1 else f"{setting}_{name}"
        rows += rows_of(out / name / "results.csv", label)
    return rows


def rows_of(results: Path, setting: str) -> list[dict[str, str]]:
    """The finished runs of an ablation."""
    with open(results, newline="", encoding="utf-8") as f:
        rows = [row for row in csv.DictReader(f) if row["status"] == "done"]
    return [
        {
            "setting": setting,
            "method": row["cell"],
            "seed": row["seed"],
            **{key: f"{float(row[key]):.2f}" for key in ("AP", "AP50", "AP75")},
        }
        for row in rows
    ]


def run(args: argparse.Namespace) -> None:
    # Without being asked for, the photographs only where they are.
    settings = args.setting or [name for name in SETTINGS if name not in PHOTOS or args.photos]
    if set(settings) - {"shapes"} - PHOTOS and not os.path.isdir(args.bccd):
        raise UserError(
            f"--bccd {args.bccd or 'is missing'}: no such folder: name that of BCCD in Pascal VOC "
            "form, or take --setting shapes"
        )
    if PHOTOS & set(settings):
        _check_photos(args)
    rows = [row for setting in settings for row in run_setting(setting, args)]
    table = Path(args.out) / "study.csv"
    with open(table, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    say(f"\nruns: {table}")


def _check_photos(args: argparse.Namespace) -> None:
    """Raise a UserError if a file of the photographs' settings is missing, before a run."""
    parts = [os.path.join(args.photos, name) for name in ("train.json", "val.json", "images")]
    if not (args.photos and all(map(os.path.exists, parts))):
        raise UserError(
            f"--photos {args.photos or 'is missing'}: it must be a folder with train.json and "
            "val.json in COCO form and images/"
        )
    if not os.path.isfile(args.yolox_nano):
        raise UserError(
            f"--yolox-nano {args.yolox_nano or 'is missing'}: no such file: name the published "
            "weights of YOLOX-nano"
        )
    if args.lite0 and not os.path.isfile(args.lite0):
        raise UserError(f"--lite0 {args.lite0}: no such file")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, path = parser.add_argument, {"type": os.path.expanduser, "metavar": "DIR"}
    add("--bccd", **path, default="", help="the folder of BCCD (Pascal VOC form)")
    add("--shapes", **path, default="datasets/shapes", help="of the generated data")
    add("--photos", **path, default="", help="the folder of the photographs (COCO form)")
    weights = {**path, "metavar": "FILE", "default": ""}
    add("--yolox-nano", **weights, help="the photographs' teacher: YOLOX-nano's published weights")
    add("--lite0", **weights, help="timm's tf_efficientnet_lite0 (default: from the network)")
    add("--out", **path, default="output/study", help="folder of the runs")
    add("--setting", action="append", choices=SETTINGS, help="one of them; repeatable")
    add("--seeds", help="as dfd ablate's (default: 1:6, 0:3, 0:5 or 0:10, as the tables have)")
    add("--parallel", type=int, default=2, metavar="K", help="runs at a time (default: 2)")
    args = parser.parse_args()
    stop_on_signals()
    with ending_in_one_line("; what was running has been ended"):
        run(args)


if __name__ == "__main__":
    main()

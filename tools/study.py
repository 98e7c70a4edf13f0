#!/usr/bin/env python
"""Repeat the study of docs/results.md: teachers, every method over several seeds, the final table.

    python tools/study.py --bccd path/to/BCCD [--out output/study] [--parallel 2]

In each setting the teacher is trained unless it is there, then dfd ablate runs the methods of
configs/study_<setting>/methods.txt; the same command continues what was stopped. The runs of all
settings go into <out>/study.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import sys
import warnings
from pathlib import Path

# torch's own, on import; nothing that a user of the study can act on.
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")

from dfd.engine.console import Interrupted, end, override, say, start, stop_on_signals  # noqa: E402
from dfd.errors import UserError  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
DFD = (sys.executable, "-m", "dfd")
SETTINGS = ("bccd", "shapes")
COLUMNS = ("setting", "method", "seed", "AP", "AP50", "AP75")


class StepFailed(Exception):
    """A child process failed; it has said why."""


def call(command: list[str]) -> None:
    """Run a command to its end.

    Raises:
        StepFailed: it failed.
    """
    say(f"$ {shlex.join(command)}")
    # One thread a run: the table's numbers depend on it.
    process = start(command, output=None, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        code = process.wait()
    finally:
        end(process)
    if code:
        raise StepFailed(f"the command above failed with exit code {code}")


def data_overrides(setting: str, args: argparse.Namespace) -> list[str]:
    """Where a setting's data are; of the final table they are the test split, not the tuning's."""
    if setting == "bccd":
        return [
            override("dataloader.train.dataset.root", Path(args.bccd)),
            "dataloader.test.dataset.split=test",
        ]
    return [
        override("dataloader.train.dataset.root", Path(args.shapes)),
        override("dataloader.test.dataset.root", Path(args.shapes)),
        "dataloader.test.dataset.seed=0",
    ]


def run_setting(setting: str, args: argparse.Namespace) -> list[dict[str, str]]:
    """Teacher and methods of one setting; the rows of its runs."""
    out, data = Path(args.out) / setting, data_overrides(setting, args)
    configs = Path(os.path.relpath(ROOT / "configs" / f"study_{setting}"))
    teacher = out / "teacher"
    if not (teacher / "summary.json").is_file():
        command = [*DFD, "train", "--config-file", str(configs / "teacher.py")]
        command += ["--resume"] if (teacher / "last_checkpoint").is_file() else []
        call([*command, override("train.output_dir", teacher), *data])
    checkpoint = override("model.teacher.checkpoint", teacher / "model_final.pth")
    methods = out / "methods"
    command = [*DFD, "ablate", f"@{configs / 'methods.txt'}"]
    command += ["--config-file", str(configs / "dfd.py"), "--out", str(methods)]
    command += ["--seeds", args.seeds, "--parallel", str(args.parallel)]
    call([*command, *data, checkpoint])
    with open(methods / "results.csv", newline="", encoding="utf-8") as f:
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
    settings = args.setting or list(SETTINGS)
    if "bccd" in settings and not os.path.isdir(args.bccd):
        raise UserError(
            f"--bccd {args.bccd or 'is missing'}: no such folder: name that of BCCD in Pascal VOC "
            "form, or take --setting shapes"
        )
    rows = [row for setting in settings for row in run_setting(setting, args)]
    table = Path(args.out) / "study.csv"
    with open(table, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    say(f"\nruns: {table}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, path = parser.add_argument, {"type": os.path.expanduser, "metavar": "DIR"}
    add("--bccd", **path, default="", help="the folder of BCCD (Pascal VOC form)")
    add("--shapes", **path, default="datasets/shapes", help="of the generated data")
    add("--out", **path, default="output/study", help="folder of the runs")
    add("--setting", action="append", choices=SETTINGS, help="one of them; repeatable")
    add("--seeds", default="1:6", help="as dfd ablate's (default: 1:6)")
    add("--parallel", type=int, default=2, metavar="K", help="runs at a time (default: 2)")
    args = parser.parse_args()
    stop_on_signals()
    try:
        run(args)
    except (UserError, StepFailed) as error:
        sys.exit(f"error: {error}")
    except Interrupted as error:
        say(f"\nstopped by {error}; what was running has been ended")
        sys.exit(130)


if __name__ == "__main__":
    main()

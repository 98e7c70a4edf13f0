"""The demonstration: a teacher, and one student trained in three ways, side by side in a report.

The student is trained from scratch; from a start that takes the shapes that agree over from the
teacher (inheritance); and from that start under DFD. So what the start gives and what distillation
gives are told apart.

    dfd demo [--out output/demo] [--data datasets/demo_shapes] [key=value ...]

Trailing key=value overrides go to all trainings. A folder of an earlier demonstration at
--out is renamed, never overwritten; the data are kept and used again.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog

from ..engine.config.grammar import override
from ..engine.config.load import load_config
from ..engine.console import (
    duration,
    end,
    ending_in_one_line,
    say,
    start,
    stop_on_signals,
)
from ..engine.run_folder import training_length
from ..engine.writers import METRICS, read_metrics
from ..errors import UserError

TITLES = {
    "teacher": "train the teacher on {} labelled images",
    "student": "train the plain student on {} labelled images",
    "inherit": "the same student, started with the teacher's neck and head",
    "dfd": "the same start, now distilled by DFD",
}
STEPS = len(TITLES) + 2
NEWS_SECONDS = 15.0
# What a failed child said last, in lines.
LAST_LINES = 20


def training_state(folder: Path) -> str:
    """What a training is doing, by the files that it writes."""
    length = training_length(folder)
    if length is None or not (folder / METRICS).exists():
        return "starting"
    logged = [row for row in read_metrics(str(folder / METRICS)) if "total_loss" in row]
    if not logged:
        return f"iteration 1 of {length}"
    now = logged[-1]
    if now["iteration"] + 1 >= length:
        return "evaluating"
    left = duration(now["eta_seconds"]) if "eta_seconds" in now else "not known"
    return (
        f"iteration {now['iteration'] + 1} of {length}, total loss {now['total_loss']:.3g}, "
        f"time left {left}"
    )


def follow(command: Sequence[str], output: Path, state: Callable[[], str]) -> str:
    """Run a child to its end, and tell every few seconds what it is doing.

    Args:
        output: the file that gets what it prints.
        state: what it is doing.

    Returns:
        What it has printed.

    Raises:
        UserError: it failed; what it said last has been shown.
    """
    say(f"      $ {shlex.join(command)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    begin = told = time.monotonic()
    with output.open("w", encoding="utf-8") as file:
        process = start(command, output=file)
        try:
            while process.poll() is None:
                if time.monotonic() - told >= NEWS_SECONDS:
                    told = time.monotonic()
                    say(f"      {duration(told - begin)}: {state()}")
                time.sleep(0.2)
        finally:
            end(process)
    text = output.read_text(encoding="utf-8", errors="replace")
    if process.returncode:
        say("\n".join(text.splitlines()[-LAST_LINES:]))
        raise UserError(
            f"the command above failed with exit code {process.returncode}: all that it said is "
            f"in {output}"
        )
    say(f"      done in {duration(time.monotonic() - begin)}")
    return text


def keep_earlier(out: Path) -> None:
    """Rename the folder of an earlier demonstration to the first free name."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    # Where the first training failed at once, there is only what it printed.
    if not any((out / file).exists() for name in TITLES for file in (name, f"{name}.txt")):
        raise UserError(f"--out {out} exists and is no earlier demonstration: choose another")
    number = 1
    while os.path.lexists(f"{out}-{number}"):
        number += 1
    out.rename(f"{out}-{number}")
    say(f"An earlier {out} was renamed to {out}-{number}.")


def prepare_data(overrides: list[str]) -> dict[str, int]:
    """Write the dataset unless it is there, check every config, and count the training images."""
    drawing = logging.getLogger(f"{__package__}.shapes")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("      %(message)s"))
    drawing.setLevel(logging.INFO)
    drawing.addHandler(handler)
    counts = {}
    for name in TITLES:
        cfg = load_config(f"configs/demo/{name}.py", overrides)
        counts[name] = len(DatasetCatalog.get(instantiate(cfg.dataloader.train.dataset)))
    tests = len(DatasetCatalog.get(instantiate(cfg.dataloader.test.dataset)))
    say(f"      ready: {counts['teacher']} training and {tests} test images")
    return counts


def train(name: str, out: Path, overrides: list[str]) -> None:
    """One of the trainings, in a process of its own."""
    folder = out / name
    own = [override("train.output_dir", folder)]
    if name in ("inherit", "dfd"):
        own.append(override("model.teacher.checkpoint", out / "teacher" / "model_final.pth"))
    command = [sys.executable, "-m", "dfd", "train", "--config-file", f"configs/demo/{name}.py"]
    follow([*command, *own, *overrides], out / f"{name}.txt", lambda: training_state(folder))


def run(out: Path, data: Path, overrides: list[str]) -> None:
    """All the steps."""
    begin = time.monotonic()
    say(f"[1/{STEPS}] dataset: {data}, written on first use and used again")
    overrides = [override("dataloader.train.dataset.root", data), *overrides]
    counts = prepare_data(overrides)
    keep_earlier(out)
    for number, (name, title) in enumerate(TITLES.items(), start=2):
        say(f"[{number}/{STEPS}] {title.format(counts[name])}")
        train(name, out, overrides)
    say(f"[{STEPS}/{STEPS}] report: tables, loss curves, detections, disparity")
    command = [sys.executable, "-m", "dfd", "report", "--trust-code"]
    for name in TITLES:
        command += ["--run", f"{name}={out / name}"]
    command += ["--out", str(out / "report.html"), "--title", "DFD: the demonstration"]
    text = follow(command, out / "report.txt", lambda: "drawing")
    say(f"\nAll of it took {duration(time.monotonic() - begin)}.\n\n{text.rstrip()}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command ``dfd demo``; what goes wrong is one line and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="dfd demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    path = {"type": lambda text: Path(text).expanduser(), "metavar": "FOLDER"}
    add = parser.add_argument
    add("--out", **path, default="output/demo", help="of the runs and the report")
    add("--data", **path, default="datasets/demo_shapes", help="of the generated data")
    add("overrides", nargs="*", metavar="key=value", help="given to all trainings")
    args = parser.parse_intermixed_args(arguments)
    stop_on_signals()
    with ending_in_one_line("; what was running has been ended"):
        run(args.out, args.data, args.overrides)

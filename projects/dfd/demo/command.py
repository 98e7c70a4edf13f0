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
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog

from ..engine.config.load import load_config
from ..engine.console import (
    Interrupted,
    LiveLine,
    duration,
    end,
    override,
    say,
    start,
    stop_on_signals,
    training_length,
)
from ..engine.writers import METRICS, read_metrics
from ..errors import UserError

TITLES = {
    "teacher": "train the teacher on {} labelled images",
    "student": "train the plain student on {} labelled images",
    "inherit": "the same student, started with the teacher's neck and head",
    "dfd": "the same start, now distilled by DFD",
}
RUNS = tuple(TITLES)
STEPS = len(RUNS) + 2
# Seconds between two lines of progress, at the least, where the output is no terminal.
LINE_EVERY = 10.0
# What a failed child said last, in lines.
LAST_LINES = 20


class StepFailed(Exception):
    """A child process failed; what it said last has been shown."""


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


def follow(command: list[str], folder: Path) -> float:
    """Run a training to its end and show its state all along; returns the seconds it took.

    What it prints goes to a file beside its folder.

    Raises:
        StepFailed: it failed.
    """
    say(f"      $ {shlex.join(command)}")
    output = folder.with_suffix(".txt")
    output.parent.mkdir(parents=True, exist_ok=True)
    live = LiveLine(line_every=LINE_EVERY)
    with output.open("w", encoding="utf-8") as file:
        process = start(command, output=file)
        try:
            while process.poll() is None:
                live.update(training_state(folder))
                time.sleep(0.2)
        finally:
            live.clear()
            end(process)
    check(process.returncode, output.read_text(encoding="utf-8", errors="replace"))
    return live.elapsed


def check(code: int, text: str) -> None:
    """Show what a failed child said last."""
    if code:
        say("\n".join(text.splitlines()[-LAST_LINES:]))
        raise StepFailed(f"the command above failed with exit code {code}")


def keep_earlier(out: Path) -> None:
    """Rename the folder of an earlier demonstration to the first free name."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not any((out / name).is_dir() for name in RUNS):
        raise UserError(f"--out {out} exists and is no earlier demonstration: choose another")
    number = 1
    while os.path.lexists(f"{out}-{number}"):
        number += 1
    out.rename(f"{out}-{number}")
    say(f"An earlier {out} was renamed to {out}-{number}.")


def prepare_data(overrides: list[str]) -> dict[str, int]:
    """Write the dataset unless it is there, and check every config on the way.

    Returns:
        The number of labelled training images of each run.
    """
    configs = {name: load_config(config(name), overrides) for name in RUNS}
    counts = {
        name: len(DatasetCatalog.get(instantiate(cfg.dataloader.train.dataset)))
        for name, cfg in configs.items()
    }
    tests = len(DatasetCatalog.get(instantiate(configs["teacher"].dataloader.test.dataset)))
    say(f"      ready: {counts['teacher']} training and {tests} test images")
    return counts


def config(name: str) -> str:
    return f"configs/demo/{name}.py"


def train(name: str, out: Path, overrides: list[str]) -> None:
    folder = out / name
    command = [sys.executable, "-m", "dfd", "train", "--config-file", config(name)]
    command.append(override("train.output_dir", folder))
    if name in ("inherit", "dfd"):
        checkpoint = out / "teacher" / "model_final.pth"
        command.append(override("model.teacher.checkpoint", checkpoint))
    seconds = follow(command + overrides, folder)
    say(f"      done in {duration(seconds)}; log: {folder / 'log.txt'}")


def make_report(out: Path) -> str:
    """Write the report; returns what ``dfd report`` printed.

    Raises:
        StepFailed: it failed.
    """
    command = [sys.executable, "-m", "dfd", "report", "--trust-code"]
    for name in RUNS:
        command += ["--run", f"{name}={out / name}"]
    command += ["--out", str(out / "report.html"), "--title", "DFD: the demonstration"]
    say(f"      $ {shlex.join(command)}")
    process = start(command)
    try:
        text = process.communicate()[0]
    finally:
        end(process)
    check(process.returncode, text)
    return text


def run(out: Path, data: str, overrides: list[str]) -> None:
    """All the steps."""
    begin = time.monotonic()
    say(f"[1/{STEPS}] dataset: {data}, written on first use and used again")
    overrides = [override("dataloader.train.dataset.root", Path(data)), *overrides]
    counts = prepare_data(overrides)
    keep_earlier(out)
    for number, name in enumerate(RUNS, start=2):
        say(f"[{number}/{STEPS}] {TITLES[name].format(counts[name])}")
        train(name, out, overrides)
    say(f"[{STEPS}/{STEPS}] report: tables, loss curves, detections, disparity")
    text = make_report(out)
    say(f"\nAll of it took {duration(time.monotonic() - begin)}.\n")
    say(text.rstrip())


def run_or_explain(out: Path, data: str, overrides: list[str]) -> None:
    """All the steps; what goes wrong becomes one line and exit code 1."""
    try:
        run(out, data, overrides)
    except (UserError, StepFailed) as error:
        sys.exit(f"error: {error}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="dfd demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    path = {"type": os.path.expanduser}
    add = parser.add_argument
    add("--out", **path, default="output/demo", help="folder of the runs and the report")
    add("--data", **path, default="datasets/demo_shapes", help="folder of the generated data")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="given to all trainings"
    )
    args = parser.parse_intermixed_args(arguments)
    stop_on_signals()
    try:
        run_or_explain(Path(args.out), args.data, args.overrides)
    except Interrupted as error:
        say(f"\nstopped by {error}; what was running has been ended")
        sys.exit(130)

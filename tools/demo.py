#!/usr/bin/env python
"""The demonstration: a teacher, and one student trained in three ways, side by side in a report.

The student is trained from scratch; from a start that takes the shapes that agree over from the
teacher (inheritance); and from that start under DFD. So what the start gives and what distillation
gives are told apart.

    python tools/demo.py [--out output/demo] [--data datasets/demo_shapes] [key=value ...]

Trailing key=value overrides go to all trainings. A folder of an earlier demonstration at
--out is renamed, never overwritten; the data are kept and used again.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import re
import shlex
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from pathlib import Path

# torch's own, on import; nothing that a user of the demonstration can act on.
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
if __name__ == "__main__":
    print("Loading Detectron2 ...", flush=True)

from dfd import UserError  # noqa: E402
from dfd.engine.console import (  # noqa: E402
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

ROOT = Path(__file__).resolve().parents[1]
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
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PROGRESS = re.compile(r"eta: (.+?)  iter: (\d+)  total_loss: (\S+)")
_INFERENCE = re.compile(r"Inference done (\d+)/(\d+)")


class StepFailed(Exception):
    """A child process failed; what it said last has been shown."""


class TrainingState:
    """What a training is doing, read from what it prints."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._length: int | None = None
        self.text = "starting"

    def read(self, line: str) -> None:
        if match := _PROGRESS.search(line):
            eta, iteration, loss = match.groups()
            self.text = (
                f"iteration {int(iteration) + 1} of {self._iterations()}, {eta} to go, "
                f"total loss {loss}"
            )
        elif match := _INFERENCE.search(line):
            self.text = f"evaluating, image {match[1]} of {match[2]}"

    def _iterations(self) -> str:
        if self._length is None:
            self._length = training_length(self._folder)
        return str(self._length or "?")


def follow(command: list[str], state: TrainingState) -> float:
    """Run a training to its end and show its state all along; returns the seconds it took.

    Raises:
        StepFailed: it failed.
    """
    say(f"      $ {shlex.join(command)}")
    process = start(command)
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read_lines, args=(process, lines), daemon=True).start()
    last: deque[str] = deque(maxlen=20)
    live = LiveLine(line_every=LINE_EVERY)
    try:
        while True:
            try:
                line = lines.get(timeout=0.5)
            except queue.Empty:
                live.update(state.text)
                continue
            if line is None:
                break
            last.append(line)
            state.read(line)
            live.update(state.text)
        code = process.wait()
    finally:
        live.clear()
        if process.poll() is None:
            end(process)
    check(code, last)
    return live.elapsed


def _read_lines(process: subprocess.Popen, lines: queue.Queue[str | None]) -> None:
    for line in process.stdout:
        lines.put(_ANSI.sub("", line.rstrip()))
    lines.put(None)


def check(code: int, lines: deque[str]) -> None:
    """Show what a failed child said last."""
    if code:
        say("\n".join(lines))
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
    from detectron2.config import instantiate
    from detectron2.data import DatasetCatalog

    from dfd.engine.config.load import load_config

    configs = {name: load_config(str(ROOT / config(name)), overrides) for name in RUNS}
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("      %(message)s"))
    writer = logging.getLogger("dfd.demo.shapes")
    writer.setLevel(logging.INFO)
    writer.addHandler(handler)
    counts = {
        name: len(DatasetCatalog.get(instantiate(cfg.dataloader.train.dataset)))
        for name, cfg in configs.items()
    }
    tests = len(DatasetCatalog.get(instantiate(configs["teacher"].dataloader.test.dataset)))
    say(f"      ready: {counts['teacher']} training and {tests} test images")
    return counts


def config(name: str) -> str:
    return f"configs/demo/{name}.py"


def relative(path: str) -> str:
    """A path of the repository as a user would type it here."""
    return os.path.relpath(ROOT / path)


def train(name: str, out: Path, overrides: list[str]) -> None:
    folder = out / name
    command = [sys.executable, relative("train_net.py"), "--config-file", relative(config(name))]
    command.append(override("train.output_dir", folder))
    if name in ("inherit", "dfd"):
        checkpoint = out / "teacher" / "model_final.pth"
        command.append(override("model.teacher.checkpoint", checkpoint))
    seconds = follow(command + overrides, TrainingState(folder))
    say(f"      done in {duration(seconds)}; log: {folder / 'log.txt'}")


def make_report(out: Path) -> str:
    """Write the report; returns what ``tools/report.py`` printed.

    Raises:
        StepFailed: it failed.
    """
    command = [sys.executable, relative("tools/report.py"), "--trust-code"]
    for name in RUNS:
        command += ["--run", f"{name}={out / name}"]
    command += ["--out", str(out / "report.html"), "--title", "DFD: the demonstration"]
    say(f"      $ {shlex.join(command)}")
    process = start(command)
    try:
        text = process.communicate()[0]
    finally:
        if process.poll() is None:
            end(process)
    check(process.returncode, deque(text.splitlines(), maxlen=20))
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    path = {"type": os.path.expanduser}
    add = parser.add_argument
    add("--out", **path, default="output/demo", help="folder of the runs and the report")
    add("--data", **path, default="datasets/demo_shapes", help="folder of the generated data")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="given to all trainings"
    )
    args = parser.parse_intermixed_args()
    stop_on_signals()
    try:
        run_or_explain(Path(args.out), args.data, args.overrides)
    except Interrupted as error:
        say(f"\nstopped by {error}; what was running has been ended")
        sys.exit(130)


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Kill a small run at random moments, resume it, and compare it with the run never killed.

    python tools/kill_resume.py --times 20 --out output/kill_resume [key=value ...]

Every third kill waits for a checkpoint to be half written; the others come at any time from the
start of the process to its end. (A run that ends before it is killed does not count.) Each killed
run is continued with --resume and must end with the same weights, head and optimizer, bit for bit,
and the same metrics.json, but for what tells time and memory. The last line is "k of N identical";
exit code 1 if k < N.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

# torch's own, on import; nothing that a user of this can act on.
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")

import torch  # noqa: E402

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
# A distilled run of seconds, with everything that a checkpoint has to keep: workers, augmentation,
# sampled proposals, batch norms, a learnt criterion, accumulation, evaluation on the way.
SMALL = [
    "dataloader.train.dataset.num_train=24",
    "dataloader.train.dataset.num_val=4",
    "dataloader.train.dataset.num_images=null",
    "dataloader.train.dataset.image_size=64",
    "dataloader.train.total_batch_size=4",
    "model.teacher.allow_random=True",
    "model.teacher.checkpoint=",
    "model.head.criterion.lenient=context",
    "model.head.warmup_iters=10",
    "train.accumulation_steps=2",
    "train.clip_grad_norm=10",
    "train.max_iter=30",
    "train.eval_period=10",
    "train.log_period=4",
    "train.checkpointer.period=3",
    "train.checkpointer.max_to_keep=2",
    "train.disparity_images.period=0",
]
# What a run logs about the machine, not about the training.
MACHINE = ("time", "data_time", "eta_seconds", "rank_data_time", "peak_memory_mib")


def command(args: argparse.Namespace, folder: Path, *flags: str) -> list[str]:
    script = os.path.relpath(ROOT / "train_net.py")
    run = [sys.executable, script, "--config-file", args.config_file, *flags]
    data = override("dataloader.train.dataset.root", Path(args.out) / "data")
    settings = [] if args.own_config else [*SMALL, data]
    return [*run, *settings, *args.overrides, override("train.output_dir", folder)]


def launch(args: argparse.Namespace, folder: Path, *flags: str) -> subprocess.Popen:
    log = folder.parent / f"{folder.name}.log"
    # One thread: with more, the sums of a step may be taken in another order.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "ab") as f:
        return start(command(args, folder, *flags), output=f, env=env)


def finish(process: subprocess.Popen, folder: Path) -> None:
    """
    Raises:
        UserError: the run failed.
    """
    try:
        code = process.wait()
    finally:
        end(process)
    check_code(code, folder)


def check_code(code: int, folder: Path) -> None:
    if code:
        raise UserError(f"a run failed with exit code {code}: see {folder}.log")


def kill(
    process: subprocess.Popen, folder: Path, *, after: float, in_checkpoint: bool
) -> str | None:
    """SIGKILL the run; what it was doing then, None if it had ended before.

    Raises:
        UserError: it had failed before.
    """
    began = time.monotonic()
    partial = None
    try:
        while process.poll() is None:
            late = time.monotonic() - began >= after
            if late and in_checkpoint:
                partial = next(folder.glob(".model_*.partial"), None)
            if partial or (late and not in_checkpoint):
                break
            time.sleep(0.001)
    finally:
        # Its workers with it, and without a word of warning.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    if code != -signal.SIGKILL:
        check_code(code, folder)
        return None
    what = f"after {after:.1f} s"
    if partial:
        what += f", while it wrote {partial.name[1:].removesuffix('.partial')}"
    # A killed run's own files tell how far it came.
    last = folder / "last_checkpoint"
    return f"{what}, last checkpoint {last.read_text() if last.exists() else 'none'}"


def differences(a: Any, b: Any, where: str) -> list[str]:
    """Where two nested contents are not equal bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        # As bytes: 0 and -0 are equal numbers, and no nan equals itself.
        same = same and torch.equal(*(x.flatten().view(torch.uint8) for x in (a, b)))
        return [] if same else [where]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = zip(a, b, strict=True)
        return [d for i, (x, y) in enumerate(pairs) for d in differences(x, y, f"{where}.{i}")]
    # As text, in which a metric that is no number equals itself.
    return [] if repr(a) == repr(b) else [where]


def state(folder: Path) -> dict[str, Any]:
    """What a run has come to: its last checkpoint and what it logged."""
    content = torch.load(folder / "model_final.pth", weights_only=True)
    for key in MACHINE:
        content["trainer"]["scalars"].pop(key, None)
    # Those are a part of it.
    del content["metrics_size"]
    with open(folder / "metrics.json", encoding="utf-8") as f:
        lines = [json.loads(line) for line in f]
    lines = [{k: v for k, v in line.items() if k not in MACHINE} for line in lines]
    return {"checkpoint": content, "metrics": lines}


def run(args: argparse.Namespace) -> int:
    """
    Returns:
        How many of the killed and resumed runs were identical to the one never killed.
    """
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty: choose another, or move it away")
    out.mkdir(parents=True, exist_ok=True)
    say(f"the run that is not killed: {out / 'whole'}")
    began = time.monotonic()
    finish(launch(args, out / "whole"), out / "whole")
    seconds = time.monotonic() - began
    expected = state(out / "whole")
    say(f"it took {seconds:.0f} s")
    chance = random.Random(args.seed)
    identical = 0
    for number in range(1, args.times + 1):
        folder = out / f"killed_{number:03d}"
        in_checkpoint = number % 3 == 0
        what = None
        while what is None:
            shutil.rmtree(folder, ignore_errors=True)
            # Before the first checkpoint, much of the time is the start of the process.
            after = chance.uniform(0.4 * seconds if in_checkpoint else 0, seconds)
            what = kill(launch(args, folder), folder, after=after, in_checkpoint=in_checkpoint)
        finish(launch(args, folder, "--resume"), folder)
        found = differences(expected, state(folder), "run")
        identical += not found
        verdict = "identical" if not found else f"DIFFERENT in {', '.join(found[:3])}"
        say(f"{number} of {args.times}: killed {what}: {verdict}")
        if not found:
            shutil.rmtree(folder)
    return identical


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--times", type=int, default=20, metavar="N", help="kills (default: 20)")
    path = {"type": os.path.expanduser, "metavar": "DIR"}
    add("--out", required=True, **path, help="folder of the runs, new or empty")
    add("--seed", type=int, default=0, help="of the moments (default: 0)")
    add(
        "--config-file",
        default=os.path.relpath(ROOT / "configs/demo/dfd.py"),
        help="another run to kill, taken as it is but for the overrides",
    )
    add("overrides", nargs="*", metavar="key=value", help="settings of the run")
    args = parser.parse_args()
    args.own_config = args.config_file != parser.get_default("config_file")
    stop_on_signals()
    with ending_in_one_line("; what was running has been ended"):
        identical = run(args)
    say(f"{identical} of {args.times} identical")
    sys.exit(0 if identical == args.times else 1)


if __name__ == "__main__":
    main()

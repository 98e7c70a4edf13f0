"""How fast and how large are the student of a finished run, its teacher and the exported student?

    dfd benchmark --run output/bccd/dfd --exported student.onnx

One table: parameters, FLOPs (fvcore's count of multiply-adds), size, latency of one image,
throughput in batches, and the memory that a process with this model alone takes. Times are from the
resized image to its detections, measured in turns, so that a machine that others use slows all
alike. The images are some of the run's test data, evenly spaced, or --images.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.utils.analysis import FlopCountAnalysis
from tabulate import tabulate
from torch import Tensor, nn

from ..engine.console import ending_in_one_line, say, stop_on_signals
from ..engine.machine import peak_memory_mib, processor_name
from ..engine.run_folder import RunFolder, load_runs
from ..engine.state.files import whole_file
from ..errors import UserError
from .command import (
    add_images,
    is_there,
    make_folder,
    run_parser,
    usable_device,
    writing,
)
from .inputs import photographs
from .program_model import program_size
from .student import Student, load_student

_WARM_UP = 2
Batch = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Candidate:
    """A detector to measure.

    Args:
        call: from a batch to its detections.
        module: whose parameters and operations are counted; None: neither is known.
        batches: whether a call computes several images at once.
    """

    name: str
    call: Callable[[Batch], Any]
    module: nn.Module | None
    batches: bool = True


@dataclass(frozen=True)
class Measured:
    """What one detector showed; None where it is not known.

    Args:
        gflops: 10^9 multiply-adds for an image, mean over the images.
        weights_mib: of weights and statistics; of the exported student, its file.
        latency_ms, latency_p90_ms: of one image, over images and repeats.
        images_per_second: in batches.
        memory_mib: the peak of a process that runs it alone, less what the libraries take.
    """

    name: str
    parameters: int | None
    gflops: float | None
    weights_mib: float
    latency_ms: float
    latency_p90_ms: float
    images_per_second: float
    memory_mib: float | None


def candidates(run: RunFolder, args: argparse.Namespace, student: Student) -> Iterator[Candidate]:
    """The detectors that a run has, each loaded when it is asked for."""
    yield Candidate("student", student.model, student.model)
    if args.exported:
        exported = load_student(run, weights=args.weights, exported=args.exported)
        yield Candidate("exported", exported.model, None, batches=False)
    if run.distilled and not args.no_teacher:
        teacher = instantiate(run.cfg.model.teacher)

        def detect(batch: Batch) -> list[dict]:
            return teacher.detect(batch, input_format=student.image_format, device=args.device)

        yield Candidate("teacher", detect, teacher.model)


def check_teacher(run: RunFolder) -> None:
    """
    Raises:
        UserError: the run's teacher has no weights, or sees other images than its student.
    """
    node = run.cfg.model.get("teacher") or {}
    if not node.get("checkpoint"):
        raise UserError(f"--run {run.name} names no weights of a teacher: give --no-teacher")
    scale = instantiate(node.get("scale", 1.0))
    if scale != 1:
        raise UserError(
            f"--run {run.name}: its teacher sees images of {scale:g} times the student's sides, "
            "and all are measured on the same: give --no-teacher"
        )


def measure_times(
    found: Sequence[Candidate], images: Sequence[Tensor], repeats: int, batch: int, device: str
) -> dict[str, tuple[list[float], float]]:
    """Seconds of each single image, and images per second in batches, by name; in turns."""
    singles: dict[str, list[float]] = {c.name: [] for c in found}
    rates: dict[str, list[float]] = {c.name: [] for c in found}
    group = [{"image": images[i % len(images)]} for i in range(batch)]
    for turn in range(_WARM_UP + repeats):
        for candidate in found:
            times = [_seconds(candidate.call, [{"image": x}], device) for x in images]
            if candidate.batches:
                rate = batch / _seconds(candidate.call, group, device)
            else:
                rate = len(times) / sum(times)
            if turn >= _WARM_UP:
                singles[candidate.name] += times
                rates[candidate.name].append(rate)
    return {name: (singles[name], statistics.median(rates[name])) for name in singles}


def _seconds(call: Callable[[Batch], Any], batch: Batch, device: str) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        call(batch)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def count_gflops(module: nn.Module, images: Sequence[Tensor]) -> float | None:
    """Mean over images of fvcore's count; None where it cannot be traced."""
    try:
        counts = []
        for image in images:
            analysis = FlopCountAnalysis(module, [{"image": image}])
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            analysis.tracer_warnings("none")
            counts.append(analysis.total())
    except Exception:  # The tracer raises whatever it meets; a count is no reason to stop.
        return None
    return statistics.mean(counts) / 1e9


def _memory_in_another_process(name: str, arguments: Sequence[str]) -> float:
    command = [sys.executable, "-W", "ignore", "-m", "dfd", "benchmark"]
    done = subprocess.run(
        [*command, *arguments, "--memory-of", name], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"the memory of the {name} cannot be measured (see above)")
    return float(done.stdout.split()[-1])


def _memory(run: RunFolder, args: argparse.Namespace) -> float:
    """MiB that one detector takes in this process, which has to be a fresh one."""
    name = args.memory_of
    before = peak_memory_mib()
    exported = args.exported if name == "exported" else None
    student = load_student(run, weights=args.weights, device=args.device, exported=exported)
    call: Callable[[Batch], Any] = student.model
    if name == "teacher":
        call = next(c.call for c in candidates(run, args, student) if c.name == name)
    for x in _pixels(run, args, student):
        _seconds(call, [{"image": x}], args.device)
    return peak_memory_mib() - before


def _weights_mib(candidate: Candidate, args: argparse.Namespace) -> float:
    if candidate.module is None:
        return os.path.getsize(args.exported) / 2**20
    tensors = candidate.module.state_dict().values()
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def _pixels(run: RunFolder, args: argparse.Namespace, student: Student) -> list[Tensor]:
    """What all are given: the student's images, in the size of a program that takes one alone."""
    if args.exported and args.exported.endswith(".pt2"):
        student = student.of_size(*program_size(args.exported))
    images = photographs(run, student.image_format, args.images, args.num_images)
    return [student.pixels(image) for image in images]


def benchmark(
    run: RunFolder, args: argparse.Namespace, arguments: Sequence[str]
) -> tuple[list[Measured], int]:
    """Measure every detector of a run, and tell on how many images."""
    student = load_student(run, weights=args.weights, device=args.device)
    images = _pixels(run, args, student)
    found = list(candidates(run, args, student))
    times = measure_times(found, images, args.repeats, args.batch, args.device)
    rows = []
    for c in found:
        seconds, rate = times[c.name]
        rows.append(
            Measured(
                name=c.name,
                parameters=c.module and sum(p.numel() for p in c.module.parameters()),
                gflops=c.module and count_gflops(c.module, images[:4]),
                weights_mib=_weights_mib(c, args),
                latency_ms=1e3 * statistics.median(seconds),
                latency_p90_ms=1e3 * sorted(seconds)[int(0.9 * len(seconds))],
                images_per_second=rate,
                memory_mib=_memory_in_another_process(c.name, arguments),
            )
        )
    return rows, len(images)


def table(rows: Sequence[Measured], batch: int) -> str:
    """The rows for a terminal, the student's latency as the unit of the last column."""
    head = ["", "parameters", "GFLOPs", "weights MiB", "ms an image", "90 % below"]
    head += [f"images/s in {batch}s", "memory MiB", "to the student"]
    lines = [
        [
            row.name,
            "" if row.parameters is None else f"{row.parameters:,}",
            "" if row.gflops is None else f"{row.gflops:.2f}",
            f"{row.weights_mib:.1f}",
            f"{row.latency_ms:.1f}",
            f"{row.latency_p90_ms:.1f}",
            f"{row.images_per_second:.1f}",
            f"{row.memory_mib:.0f}",
            f"{row.latency_ms / rows[0].latency_ms:.2f}",
        ]
        for row in rows
    ]
    return tabulate(lines, head, disable_numparse=True, stralign="right")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = run_parser("benchmark", __doc__)
    add = parser.add_argument
    path = {"type": os.path.expanduser}
    add("--exported", **path, metavar="FILE", help="what dfd export wrote of it")
    add("--no-teacher", action="store_true", help="leave the teacher out")
    add_images(parser, 8)
    add("--repeats", type=int, default=5, help="turns over the images (default: 5)")
    add("--batch", type=int, default=8, help="images of a batch (default: 8)")
    add("--threads", type=int, help="of torch and onnxruntime (default: torch's own number)")
    add("--device", default="auto", help="cpu, cuda (default: cuda where there is one)")
    add("--out", **path, metavar="FILE", help="also write the numbers as json")
    add("--memory-of", help=argparse.SUPPRESS)  # In a process of its own.
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = parse_arguments(arguments)
    stop_on_signals()
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    with ending_in_one_line():
        for name in ("num_images", "repeats", "batch", "threads"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: it must be 1 or more")
        if args.device == "auto" or not args.memory_of:  # What a try takes is no model's memory.
            args.device = usable_device(args.device)
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.out and not args.memory_of:
            if is_there(Path(args.out), "--out"):
                raise UserError(f"--out {args.out}: it exists: choose another")
            make_folder(Path(args.out).parent, "--out")
        if args.exported and not os.path.isfile(args.exported):
            raise UserError(f"{args.exported}: no such file")
        (run,) = load_runs({"run": args.run}, trusted=args.trust_code)
        if run.distilled and not args.no_teacher:
            check_teacher(run)
        if args.memory_of:
            print(_memory(run, args))
            return
        rows, num_images = benchmark(run, args, arguments)
    say(table(rows, args.batch))
    where = processor_name(args.device)
    say(
        f"\n{where or args.device}, threads: {torch.get_num_threads()}, {num_images} images, "
        f"{args.repeats} turns; medians. The exported file runs on the CPU, one image at a time."
    )
    if args.out:
        content = {"processor": where, "threads": torch.get_num_threads(), "batch": args.batch}
        with ending_in_one_line(), writing(Path(args.out)), whole_file(args.out) as f:
            json.dump({**content, "models": [asdict(row) for row in rows]}, f, indent=1)

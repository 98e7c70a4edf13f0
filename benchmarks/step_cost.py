#!/usr/bin/env python
"""What distillation costs: time and memory of a distilled step beside the plain student's.

    python benchmarks/step_cost.py [--json] [--config-file configs/...] [key=value ...]

On random images and random weights of the right shapes, so that it needs no data. Everything is
measured in one process in turns (A B C A B C ...), because a shared machine drifts; only the
ratios of medians are worth anything. Peak memory is that of a process of its own for either step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from dfd import UserError
from dfd.distill.contract import run_features
from dfd.engine.config.load import load_config
from dfd.engine.config.resolve import resolve_pixels, skip_pretrained
from dfd.engine.machine import peak_memory_mib

NUM_CLASSES = 3
BOXES_PER_IMAGE = 13  # As in BCCD.


def random_batch(
    num_images: int,
    height: int,
    width: int,
    boxes: int = BOXES_PER_IMAGE,
    num_classes: int = NUM_CLASSES,
) -> list[dict]:
    """A labelled batch with so many boxes an image, of 15 to 60 pixels."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(num_images):
        size = 15 + 45 * torch.rand(boxes, 1, generator=generator)
        corner = torch.rand(boxes, 2, generator=generator)
        corner = corner * (torch.tensor([width, height]) - size)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + size], dim=1))
        instances.gt_classes = torch.randint(num_classes, (boxes,), generator=generator)
        shape = (3, height, width)
        image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        batch.append({"image": image, "instances": instances})
    return batch


def with_teacher_images(batch: list[dict], scale: float) -> list[dict]:
    """The batch with images of the teacher's size, where that is another."""
    if scale == 1:
        return batch
    return [
        item | {"teacher_image": F.interpolate(item["image"][None].float(), scale_factor=scale)[0]}
        for item in batch
    ]


def build(args: argparse.Namespace) -> nn.Module:
    """The distilling model of the config, with a random teacher."""
    cfg = load_config(args.config_file, args.opts)
    if "teacher" not in cfg.model:
        raise UserError(f"--config-file {args.config_file} has no model.teacher")
    cfg.model.teacher.checkpoint = ""
    cfg.model.teacher.allow_random = True
    for detector in (cfg.model.student, cfg.model.teacher.model):
        heads = detector.roi_heads if "roi_heads" in detector else detector
        if heads.num_classes == "auto":
            heads.num_classes = NUM_CLASSES
    resolve_pixels(cfg)
    skip_pretrained(cfg.model)
    torch.manual_seed(0)
    return instantiate(cfg.model).to(args.device).train()


def make_step(model: nn.Module, batch: list[dict]) -> Callable[[], None]:
    """Forward, backward and update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    return step


def make_loss(model: nn.Module, batch: list[dict]) -> Callable[[], None]:
    """The distillation losses alone, forward and backward, adapters and criterion included."""
    what = model.head.features
    with torch.no_grad():
        images = model.student.preprocess_image(batch).tensor
        student = run_features(model.student, images, "student", **what)
        teacher = model.teacher(batch, input_format=model.input_format, device=model.device, **what)
    student = {name: features.requires_grad_() for name, features in student.items()}
    sizes = [tuple(item["image"].shape[-2:]) for item in batch]

    def loss() -> None:
        losses = model.head(student, teacher, sizes)
        sum(losses.values()).backward()

    return loss


def make_teacher_passes(
    model: nn.Module, batch: list[dict]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The teacher's trunk in plain fp32, as its own forward runs it, and as FrozenTeacher does."""
    teacher = model.teacher

    @torch.no_grad()
    def plain() -> None:
        items = teacher.own_images(batch, model.input_format)
        teacher.model.backbone(teacher.network_input(items))

    def frozen() -> None:
        teacher(batch, input_format=model.input_format, device=model.device)

    return plain, frozen


def measure(calls: dict[str, Callable[[], None]], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each call; all of them in turn, ``repeats`` times, after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_memory(args: argparse.Namespace, batch: list[dict]) -> None:
    """Three steps of one kind, then this process's peak memory on the last line."""
    model = build(args)
    batch = with_teacher_images(batch, model.teacher.scale)
    model = model.student if args.memory_of == "plain" else model
    step = make_step(model, batch)
    with EventStorage(0):
        for _ in range(3):
            step()
    print(peak_memory_mib())


def peak_memory(kind: str, argv: list[str]) -> float:
    command = [sys.executable, __file__, "--memory-of", kind, *argv]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout.splitlines()[-1])


def run(args: argparse.Namespace, argv: list[str]) -> dict[str, float]:
    batch = random_batch(args.batch, args.height, args.width)
    if args.memory_of:
        measure_memory(args, batch)
        return {}
    model = build(args)
    batch = with_teacher_images(batch, model.teacher.scale)
    plain_pass, frozen_pass = make_teacher_passes(model, batch)
    calls = {
        "plain_step": make_step(model.student, batch),
        "distilled_step": make_step(model, batch),
        "teacher_pass_fp32": plain_pass,
        "teacher_pass": frozen_pass,
        "dfd_loss": make_loss(model, batch),
    }
    with EventStorage(0):
        seconds = measure(calls, args.repeats, args.device)
    memory = {kind: peak_memory(kind, argv) for kind in ("plain", "distilled")}
    return {
        "teacher_pass_ratio": seconds["teacher_pass"] / seconds["teacher_pass_fp32"],
        "distilled_step_ratio": seconds["distilled_step"] / seconds["plain_step"],
        "dfd_loss_ratio": seconds["dfd_loss"] / seconds["plain_step"],
        "peak_memory_ratio": memory["distilled"] / memory["plain"],
        **{f"{name}_seconds": value for name, value in seconds.items()},
        **{f"{kind}_peak_memory_mib": value for kind, value in memory.items()},
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="configs/bccd/dfd.py")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--height", type=int, default=160, help="of the images, in pixels")
    parser.add_argument("--width", type=int, default=213)
    parser.add_argument("--memory-of", choices=("plain", "distilled"), help=argparse.SUPPRESS)
    parser.add_argument("opts", nargs="*", help="overrides of the config, key=value")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        result = run(args, argv)
    except UserError as error:
        sys.exit(f"error: {error}")
    if args.memory_of:
        return
    if not args.json:
        for name, value in result.items():
            print(f"{name:28} {value:10.4f}")
        return
    print(json.dumps({name: round(value, 5) for name, value in result.items()}))


if __name__ == "__main__":
    main(sys.argv[1:])

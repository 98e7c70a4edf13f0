#!/usr/bin/env python
"""What YOLOX costs: its network beside a plain one, and SimOTA's share of a training step.

    python benchmarks/yolox_cost.py [--json] [--name s] [--size 320] [--batch 2] ...

First forward and backward of the network, in training, to its raw outputs, with their sum as the
loss, beside the same network as plain_yolox.py has it, with the same weights; the outputs must be
the same, and how far they differ is told too. Then a whole step (forward, losses, backward,
update) with 8 and with 50 objects an image: the matching's share of it, timed within the step
(``_in_step``) and on its own (``_alone``).

On random images and fresh weights. Everything is measured in one process in turns (A B A B ...),
because a shared machine drifts; only ratios of medians are worth anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from detectron2.utils.events import EventStorage
from plain_yolox import PlainYOLOX
from step_cost import make_step, measure, random_batch
from torch import Tensor, nn

from dfd import UserError
from dfd.modeling.yolox import PRESETS, YOLOX, losses
from dfd.modeling.yolox.assign import FORMS

NUM_CLASSES = 80  # As in COCO.
OBJECTS_PER_IMAGE = (8, 50)  # COCO's mean, and a crowd as mosaic makes it.


def build(args: argparse.Namespace) -> YOLOX:
    torch.manual_seed(0)
    model = YOLOX(**PRESETS[args.name], num_classes=NUM_CLASSES, form=args.form)
    return model.to(args.device).train()


def raw_outputs(model: YOLOX, images: Tensor) -> tuple[Tensor, ...]:
    predictions, _ = model.head(model.backbone(images))
    return tuple(predictions)


def largest_difference(model: YOLOX, plain: nn.Module, images: Tensor) -> float:
    """Between the raw outputs, both in training.

    Raises:
        RuntimeError: it is more than rounding, so that a comparison would say nothing.
    """
    with torch.no_grad():
        regression, objectness, classes = raw_outputs(model, images)
        ours = torch.cat([regression, objectness[..., None], classes], dim=2)
        theirs = plain(images)
    difference = (ours - theirs).abs().max().item()
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
        raise RuntimeError(f"the two networks are not the same: outputs differ by {difference:g}")
    return difference


def measure_network(args: argparse.Namespace) -> dict[str, float]:
    """Forward and backward, ours and the plain one's."""
    model = build(args)
    plain = PlainYOLOX(**PRESETS[args.name], num_classes=NUM_CLASSES).to(args.device).train()
    plain.load_state_dict(model.state_dict(), strict=True)
    generator = torch.Generator().manual_seed(0)
    images = 255 * torch.rand(args.batch, 3, args.size, args.size, generator=generator)
    images = images.to(args.device)
    difference = largest_difference(model, plain, images)

    def step(network: nn.Module, outputs: Callable[[], tuple[Tensor, ...]]) -> None:
        sum(output.sum() for output in outputs()).backward()
        network.zero_grad()

    calls = {
        "network": partial(step, model, lambda: raw_outputs(model, images)),
        "plain_network": partial(step, plain, lambda: (plain(images),)),
    }
    seconds = measure(calls, args.repeats, args.device)
    return {
        "network_ratio": seconds["network"] / seconds["plain_network"],
        "largest_output_difference": difference,
        **{f"{name}_seconds": value for name, value in seconds.items()},
    }


class TimedMatch:
    """The matching, which keeps how long it took and what it was last called with."""

    def __init__(self, device: str) -> None:
        self.match = losses.match
        self.cuda = device.startswith("cuda")
        self.seconds: list[float] = []
        self.arguments: tuple[Any, ...] = ()

    def __call__(self, *arguments: Any) -> losses.Targets:
        self._wait()
        start = time.perf_counter()
        targets = self.match(*arguments)
        self._wait()
        self.seconds.append(time.perf_counter() - start)
        self.arguments = arguments
        return targets

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def measure_matching(args: argparse.Namespace) -> dict[str, float]:
    """Whole steps, and the matching in them and alone, for each number of objects."""
    model = build(args)
    timed = {number: TimedMatch(args.device) for number in OBJECTS_PER_IMAGE}
    calls: dict[str, Callable[[], None]] = {}

    def step_with(match: TimedMatch, step: Callable[[], None]) -> None:
        with mock.patch.object(losses, "match", match):
            step()

    for number, match in timed.items():
        batch = random_batch(args.batch, args.size, args.size, number, NUM_CLASSES)
        calls[f"step_{number}"] = partial(step_with, match, make_step(model, batch))
        # The step just before it.
        calls[f"match_{number}"] = lambda match=match: match.match(*match.arguments)
    with EventStorage(0):
        seconds = measure(calls, args.repeats, args.device)
    shares, times = {}, {}
    for number, match in timed.items():
        step = seconds[f"step_{number}"]
        inside = statistics.median(match.seconds[-args.repeats :])
        shares[f"simota_share_{number}_in_step"] = inside / step
        shares[f"simota_share_{number}_alone"] = seconds[f"match_{number}"] / step
        times[f"step_{number}_seconds"] = step
        times[f"simota_{number}_in_step_seconds"] = inside
        times[f"simota_{number}_alone_seconds"] = seconds[f"match_{number}"]
    return shares | times


def run(args: argparse.Namespace) -> dict[str, float]:
    if args.size < 64 or args.size % 32:
        raise UserError(f"--size is {args.size}; it must be a multiple of 32, 64 or more")
    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}; it must be 1 or more")
    network, matching = measure_network(args), measure_matching(args)
    return network | matching


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--name", choices=tuple(PRESETS), default="s", help="of the published models")
    add("--form", choices=tuple(FORMS), default="main", help="of SimOTA")
    add("--size", type=int, default=320, help="of the images, in pixels")
    add("--batch", type=int, default=2)
    add("--repeats", type=int, default=9)
    add("--threads", type=int, default=1)
    add("--device", default="cpu")
    add("--json", action="store_true", help="print the result as one JSON line")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        result = run(args)
    except UserError as error:
        sys.exit(f"error: {error}")
    if args.json:
        # Not to a number of decimals: the share and the difference may be small.
        print(json.dumps({name: float(f"{value:.5g}") for name, value in result.items()}))
        return
    for name, value in result.items():
        print(f"{name:30} {value:12.5g}")


if __name__ == "__main__":
    main(sys.argv[1:])

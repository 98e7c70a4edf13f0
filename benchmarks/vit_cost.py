#!/usr/bin/env python
"""What a windowed TimmViT costs beside Detectron2's ViT of the same shape: time and memory.

    python benchmarks/vit_cost.py [--json] [--window 16] [--model vit_small_patch16_224] ...

Forward and backward of a ViT-S with 12 blocks, 4 of them global, on 2 random images of 512 x 512
pixels, without relative positions in Detectron2's. Everything is measured in one process in turns
(A B A B ...), because a shared machine drifts; only ratios of medians are worth anything. Peak
memory is that of a process of its own for either, in fp32, above what it holds before the first
step.
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
from detectron2.modeling import ViT
from torch import nn

from dfd import UserError
from dfd.engine.machine import peak_memory_mib
from dfd.modeling import TimmViT

KINDS = ("ours", "detectron2")


def build_ours(args: argparse.Namespace) -> TimmViT:
    return TimmViT(
        model_name=args.model,
        img_size=args.size,
        window_size=args.window if args.window is not None else "auto",
        prefix_tokens=args.prefix_tokens,
    )


def build_detectron2(args: argparse.Namespace) -> ViT:
    """The same width, depth, heads, windows and global blocks as ours."""
    ours = build_ours(args)
    blocks = ours.vit.blocks
    windowed = [i for i in range(len(blocks)) if i not in ours.global_blocks]
    return ViT(
        img_size=args.size,
        patch_size=ours.size_divisibility,
        embed_dim=ours.vit.embed_dim,
        depth=len(blocks),
        num_heads=blocks[0].attn.num_heads,
        mlp_ratio=blocks[0].mlp.fc1.out_features / ours.vit.embed_dim,
        window_size=ours.window_size,
        window_block_indexes=windowed,
        use_rel_pos=args.rel_pos,
    )


BUILD = {"ours": build_ours, "detectron2": build_detectron2}


def make_step(model: nn.Module, args: argparse.Namespace, dtype: torch.dtype) -> Callable:
    """Forward under autocast to ``dtype`` and backward."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch, 3, args.size, args.size, generator=generator)
    images = images.to(args.device)
    device_type = torch.device(args.device).type

    def step() -> None:
        with torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32):
            features = model(images)["last_feat"]
        features.float().square().mean().backward()
        model.zero_grad()

    return step


def measure(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, float]:
    """Median seconds of each kind's step, measured in turns."""
    steps = {}
    for kind in KINDS:
        torch.manual_seed(0)
        steps[kind] = make_step(BUILD[kind](args).to(args.device).train(), args, dtype)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for repeat in range(args.repeats + 1):
        for kind, step in steps.items():
            start = time.perf_counter()
            step()
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            if repeat:
                times[kind].append(time.perf_counter() - start)
    return {kind: statistics.median(values) for kind, values in times.items()}


def peak_memory(kind: str, argv: list[str]) -> float:
    """MiB that three steps of one kind take above the process before them."""
    command = [sys.executable, __file__, "--memory-of", kind, *argv]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout.splitlines()[-1])


def measure_memory(args: argparse.Namespace) -> float:
    model = BUILD[args.memory_of](args).to(args.device).train()
    step = make_step(model, args, torch.float32)
    before = peak_memory_mib()
    for _ in range(3):
        step()
    return peak_memory_mib() - before


def run(args: argparse.Namespace, argv: list[str]) -> dict[str, float]:
    fp32, bf16 = measure(args, torch.float32), measure(args, torch.bfloat16)
    memory = {kind: peak_memory(kind, argv) for kind in KINDS}
    return {
        "step_ratio_fp32": fp32["ours"] / fp32["detectron2"],
        "step_ratio_bf16": bf16["ours"] / bf16["detectron2"],
        "peak_memory_ratio_fp32": memory["ours"] / memory["detectron2"],
        "window": build_ours(args).window_size,
        **{f"{kind}_fp32_seconds": value for kind, value in fp32.items()},
        **{f"{kind}_bf16_seconds": value for kind, value in bf16.items()},
        **{f"{kind}_peak_memory_mib": value for kind, value in memory.items()},
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="vit_small_patch16_224", help="of timm")
    add("--size", type=int, default=512, help="of the images, in pixels")
    add("--window", type=int, help="in patches (default: TimmViT's choice)")
    add("--prefix-tokens", choices=("keep", "drop"), default="keep")
    add("--rel-pos", action="store_true", help="give Detectron2's relative positions")
    add("--batch", type=int, default=2)
    add("--repeats", type=int, default=9)
    add("--threads", type=int, default=1)
    add("--device", default="cpu")
    add("--json", action="store_true", help="print the result as one JSON line, the last")
    add("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        result = {"": measure_memory(args)} if args.memory_of else run(args, argv)
    except UserError as error:
        sys.exit(f"error: {error}")
    if args.memory_of:
        print(result[""])
    elif args.json:
        print(json.dumps({name: round(value, 5) for name, value in result.items()}))
    else:
        for name, value in result.items():
            print(f"{name:28} {value:10.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""What the commands share that do something with the student of a finished run."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from ..engine.state.checkpoint import FINAL
from ..errors import UserError, first_line


def run_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of ``dfd <name>`` that takes a run, its weights and whether its code is trusted."""
    parser = argparse.ArgumentParser(
        prog=f"dfd {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    path = {"type": os.path.expanduser}
    parser.add_argument("--run", **path, required=True, metavar="FOLDER", help="a finished run")
    parser.add_argument(
        "--weights",
        type=os.path.expanduser,
        default=FINAL,
        help=f"a file of the run's folder, or a full path (default: {FINAL})",
    )
    parser.add_argument(
        "--trust-code", action="store_true", help="let the run's config name any module"
    )
    return parser


def add_images(parser: argparse.ArgumentParser, count: int) -> None:
    """Photographs to work with, in place of the run's test data, and how many."""
    path = {"type": os.path.expanduser, "metavar": "FILE"}
    parser.add_argument(
        "--images", **path, nargs="+", default=[], help="images or folders of them"
    )
    parser.add_argument(
        "--num-images", type=int, default=count, help=f"so many are used (default: {count})"
    )


def usable_device(name: str) -> str:
    """The device that ``--device`` names; "auto": CUDA where there is one, else the CPU.

    Raises:
        UserError: there is none of that name.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # torch raises whatever the device's library does.
        raise UserError(f"--device {name}: {first_line(error)}") from error
    return name


def is_there(path: Path, option: str) -> bool:
    """Whether there is a file or folder of this name.

    Raises:
        UserError: there cannot be; the name is too long, say.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}: choose another") from error
    return True


def make_folder(path: Path, option: str) -> None:
    """
    Raises:
        UserError: it is not there and cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{option}: folder {path} cannot be made ({error.strerror}): choose another"
        ) from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the context, this file is written.

    Raises:
        UserError: it cannot be; the disk is full, say.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(
            f"{path} cannot be written ({reason}): make room, or choose another --out"
        ) from error

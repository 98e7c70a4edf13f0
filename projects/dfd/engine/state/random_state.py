"""The random generators that training draws from: their state, kept and put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The state of every generator that training draws from, in this process."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "random": (version, list(numbers), gauss),
        "numpy": (kind, keys.tolist(), position, has_gauss, cached),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """The inverse of ``random_state``."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, numbers, gauss = state["random"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *others = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *others))


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """What is drawn within the context leaves every generator as it was."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)

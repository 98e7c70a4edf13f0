"""The settings of a run as plain text, so that a resumed run can be held against its beginning."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pydoc import locate
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ..data import stream_seed
from ..errors import UserError
from .config import PARTS, pin_defaults

_IMAGES = "the number of training images"
_DATA_SEED = "dataloader.train.seed"
# Neither the weights nor what is logged depend on them; of the teacher, the content counts.
_FREE = (
    "model.teacher.checkpoint",
    "train.output_dir",
    "train.checkpointer.",
    "train.wandb.",
    "dataloader.train.num_workers",
    "dataloader.test.num_workers",
)
# What a checkpoint holds would win over the first, without a word; the others say what is at which
# place in the data.
_FIXED = ("optimizer.", "dataloader.train.total_batch_size", _DATA_SEED, _IMAGES)
_PLAIN = (type(None), bool, int, float, str)


def run_settings(cfg: DictConfig, loader: Any, num_images: int | None) -> dict[str, str]:
    """What decides how a run goes on: every setting by its key, those left to defaults included.

    Args:
        cfg: with "auto" and ``epochs`` turned into values.
        loader: of the training batches.
        num_images: of the training data; None if not known.
    """
    cfg = pin_defaults(copy.deepcopy(cfg))
    settings = {}
    for part in PARTS:
        settings.update(_flat(OmegaConf.to_container(cfg[part], resolve=True), part))
    settings = {key: text for key, text in settings.items() if not key.startswith(_FREE)}
    settings["torch"] = str(torch.__version__)
    settings["the number of threads"] = str(torch.get_num_threads())
    settings[_IMAGES] = str(num_images)
    # The one that was drawn, where the config leaves it open.
    seed = stream_seed(loader)
    if seed is not None:
        settings[_DATA_SEED] = str(seed)
    return settings


def _flat(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Each leaf's key and text; names of functions for functions, so that config.yaml is alike."""
    if isinstance(node, Mapping):
        for name, child in node.items():
            yield from _flat(child, f"{key}.{name}")
        return
    if isinstance(node, list | tuple):
        for index, child in enumerate(node):
            yield from _flat(child, f"{key}.{index}")
        return
    if key.endswith("._target_") and isinstance(node, str):
        node = locate(node) or node
    if not isinstance(node, _PLAIN):
        owner = node if hasattr(node, "__qualname__") else type(node)
        yield key, f"{owner.__module__}.{owner.__qualname__}"
        return
    yield key, str(node)


def changed_settings(began: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs between the settings that a run began with and those it is resumed with.

    Returns:
        "<key> is <now>, was <before>" of each that is not the same.

    Raises:
        UserError: one of them cannot change within a run.
    """
    changes = {
        key: f"{key} is {now.get(key, 'not set')}, was {began.get(key, 'not set')}"
        for key in {**began, **now}
        if began.get(key) != now.get(key)
    }
    fixed = [key for key in changes if key.startswith(_FIXED)]
    if fixed:
        # What refers to it has a longer key.
        raise UserError(
            f"--resume: {changes[min(fixed, key=len)]}: it cannot change within a run; set it "
            "back, or begin a new run whose train.init_checkpoint is this one's last checkpoint"
        )
    return list(changes.values())

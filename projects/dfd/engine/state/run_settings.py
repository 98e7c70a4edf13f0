"""The settings of a run as plain text, so that a resumed run can be held against its beginning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ...data import stream_seed
from ...errors import UserError
from ..config.flat import FlatSettings, differing, flat_settings
from ..config.load import PARTS
from ..config.schema import TRAIN_DEFAULTS

_IMAGES = "the number of training images"
_UNLABELLED = "the number of images without labels"
TRAINING_DATA = "the hash of the training data"
TEST_DATA = "the hash of the test data"
_DATA_SEED = "dataloader.train.seed"
# Which settings were what their functions have by default; runs of older versions do not say.
DEFAULTS = "settings left to defaults"
# Neither the weights nor what is logged depend on them; of the teacher, the content counts.
_FREE = (
    "model.teacher.checkpoint",
    "train.output_dir",
    "train.checkpointer.",
    "train.wandb.",
    "dataloader.train.num_workers",
    "dataloader.test.num_workers",
    "dataloader.evaluator.output_dir",
)
# What a checkpoint holds would win over the first, without a word; the others say what is at which
# place in the data.
_FIXED = (
    "optimizer.",
    "dataloader.train.total_batch_size",
    "dataloader.train.unlabelled",
    _DATA_SEED,
    _IMAGES,
    _UNLABELLED,
)


def run_settings(
    cfg: DictConfig,
    loader: Any,
    num_images: int | None,
    num_unlabelled: int | None = None,
    hashes: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """What decides how a run goes on: every setting by its key, those left to defaults included.

    Args:
        cfg: with "auto" and ``epochs`` turned into values.
        loader: of the training batches.
        num_images: of the training data; None if not known.
        num_unlabelled: images that are distilled only; None: there are none.
        hashes: of training and test data, under ``TRAINING_DATA`` and ``TEST_DATA``.
    """
    parts = {part: OmegaConf.to_container(cfg[part], resolve=True) for part in PARTS}
    flat = flat_settings(parts, {"train": TRAIN_DEFAULTS})
    settings = {key: text for key, text in flat.texts.items() if not key.startswith(_FREE)}
    settings["torch"] = str(torch.__version__)
    settings["the number of threads"] = str(torch.get_num_threads())
    settings[_IMAGES] = str(num_images)
    settings |= hashes or {}
    if num_unlabelled is not None:
        settings[_UNLABELLED] = str(num_unlabelled)
    # The one that was drawn, where the config leaves it open.
    seed = stream_seed(loader)
    if seed is not None:
        settings[_DATA_SEED] = str(seed)
    settings[DEFAULTS] = " ".join(sorted(flat.defaults & settings.keys()))
    return settings


def changed_settings(began: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs between the settings that a run began with and those it is resumed with.

    A parameter that its function has got or lost since is no change while it is at its default. A
    default that is another one since is a change.

    Returns:
        "<key> is <now>, was <before>" of each that is not the same.

    Raises:
        UserError: one of them cannot change within a run.
    """
    # Of an older version, which did not know them.
    unknown = {_UNLABELLED, TRAINING_DATA, TEST_DATA} - began.keys()
    now = {key: text for key, text in now.items() if key not in unknown}
    before, after = _split(began), _split(now)
    changes = {
        key: f"{key} is {now.get(key, 'not set')}, was {began.get(key, 'not set')}"
        for key in differing(before, after)
    }
    fixed = [key for key in changes if key.startswith(_FIXED)]
    if DEFAULTS not in began:
        # What its function has no more may have been a default: such a run only tells it.
        fixed = [key for key in fixed if key in now]
    if fixed:
        # What refers to it has a longer key.
        raise UserError(
            f"--resume: {changes[min(fixed, key=len)]}: it cannot change within a run; set it "
            "back, or begin a new run whose train.init_checkpoint is this one's last checkpoint"
        )
    return list(changes.values())


def _split(settings: Mapping[str, str]) -> FlatSettings:
    texts = dict(settings)
    return FlatSettings(texts, frozenset(texts.pop(DEFAULTS, "").split()))

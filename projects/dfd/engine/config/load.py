"""Reading a LazyConfig and its overrides."""

from __future__ import annotations

import copy
import os
import traceback
from collections.abc import Sequence
from typing import Any

from detectron2.config import LazyConfig
from omegaconf import DictConfig, OmegaConf

from ...errors import UserError, first_line
from .find import find_config
from .overrides import apply_overrides
from .parameters import check_switches
from .registrations import repeatable_registrations
from .saved import read_config
from .schema import add_defaults

PARTS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")


class ConfigFile:
    """A LazyConfig file, run once however often it is loaded with other overrides.

    Running one takes half a second, and an ablation needs it for each of its cells.

    Args:
        path: of the file, or of one that comes with the package; kept as ``path``.

    Raises:
        UserError: no such file, or not a training config.
    """

    def __init__(self, path: str) -> None:
        if not path:
            raise UserError("no config: give one with --config-file configs/...")
        self.path = path
        self._cfg = _read(find_config(path))

    def load(self, overrides: Sequence[str] = ()) -> DictConfig:
        """What the file says with ``key=value`` overrides, see :mod:`.overrides`; a copy.

        Raises:
            UserError: an override that cannot be read or names no known key, a word where a
                function takes a bool.
        """
        cfg = apply_overrides(copy.deepcopy(self._cfg), overrides)
        check_switches(cfg)
        if not isinstance(cfg.get("train"), DictConfig):
            raise UserError(f"train is {cfg.get('train')!r}: it must be the section of that name")
        folder = OmegaConf.to_container(cfg.train, resolve=False).get("output_dir")
        if isinstance(folder, str):
            cfg.train.output_dir = os.path.expanduser(folder)
        return cfg


def load_config(path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Load a LazyConfig file and apply ``key=value`` overrides, see :mod:`.overrides`.

    Unlike Detectron2's own, an override of a key that does not exist is refused: a misspelt one
    would otherwise change nothing without a word. A parameter that its function has but the config
    does not name may be given; anything else new needs a leading ``+``.

    Raises:
        UserError: as :class:`ConfigFile` and its ``load``.
    """
    return ConfigFile(path).load(overrides)


def _read(path: str) -> DictConfig:
    """A training config without overrides, all settings of ``train`` in it."""
    if not os.path.isfile(path):
        raise UserError(f"--config-file: no such file: {path}")
    try:
        cfg = _load(path)
    except Exception as error:  # A config is a program, and may fail in any way.
        raise UserError(
            f"--config-file {path} cannot be loaded: {first_line(error)}{_line(error, path)}"
        ) from error
    if not isinstance(cfg, DictConfig):
        raise UserError(f"--config-file {path} holds no sections: it is not a training config")
    missing = [key for key in PARTS if key not in cfg]
    if missing:
        raise UserError(
            f"--config-file {path} defines no {', '.join(missing)}: it is not a training config"
        )
    add_defaults(cfg)
    return cfg


def _load(path: str) -> Any:
    """A config that may be a program (``.py``), or settings that are read as data (``.yaml``)."""
    if path.endswith((".yaml", ".yml")):
        return read_config(path, trusted=True)
    with repeatable_registrations():
        return LazyConfig.load(path)


def _line(error: Exception, path: str) -> str:
    """Where in a config file it failed, for the message."""
    if isinstance(error.__cause__, SyntaxError):
        return f" {error.__cause__.msg}, line {error.__cause__.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    return f", line {lines[-1]}" if lines else ""

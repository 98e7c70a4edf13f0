"""Settings of a run that are wrong by themselves, told before anything is built or written."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ...errors import UserError, first_line


@dataclass(frozen=True)
class _Rule:
    must_be: str
    holds: Callable[[Any], bool]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _at_least(least: int) -> _Rule:
    return _Rule(f"an integer of at least {least}", lambda v: _is_integer(v) and v >= least)


_POSITIVE_OR_NULL = _Rule("above 0 or null", lambda v: v is None or (_is_number(v) and v > 0))
_RULES = {
    "train.output_dir": _Rule("a folder", lambda v: isinstance(v, str) and bool(v)),
    "train.max_iter": _at_least(1),
    "train.epochs": _POSITIVE_OR_NULL,
    "train.seed": _Rule("an integer", _is_integer),
    "train.accumulation_steps": _at_least(1),
    "train.clip_grad_norm": _POSITIVE_OR_NULL,
    "train.amp.enabled": _Rule("True, False or auto", lambda v: isinstance(v, bool) or v == "auto"),
    "train.eval_period": _at_least(0),
    "train.log_period": _at_least(1),
    "train.checkpointer.period": _at_least(1),
    "train.disparity_images.period": _at_least(0),
    "train.disparity_images.num_images": _at_least(0),
    "dataloader.train.total_batch_size": _at_least(1),
}


def check_settings(cfg: DictConfig) -> None:
    """
    Raises:
        UserError: a setting is of the wrong kind or outside its range, or refers to nothing.
    """
    absent = object()
    for key, rule in _RULES.items():
        try:
            value = OmegaConf.select(cfg, key, default=absent)
        except OmegaConfBaseException as error:
            raise UserError(f"{key} cannot be resolved: {first_line(error)}") from error
        if value is not absent and not rule.holds(value):
            raise UserError(f"{key} is {value!r}; it must be {rule.must_be}")


def make(node: Any, what: str) -> Any:
    """What a part of the config describes.

    Args:
        what: names the part, for the message.

    Raises:
        UserError: its function does not exist or refuses what it is given.
    """
    try:
        return instantiate(node)
    except UserError:
        raise
    except (TypeError, ValueError, ImportError, OmegaConfBaseException) as error:
        called = _called(error)
        raise UserError(
            f"{what} cannot be built: {f'{called}: ' if called else ''}{first_line(error)}"
        ) from error


def _called(error: BaseException) -> str:
    """The name of the function in whose call an instantiation failed; empty if in none."""
    name = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code is instantiate.__code__:
            name = str(frame.f_locals.get("cls_name", name))
    return name

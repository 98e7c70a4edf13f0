"""A user's own hooks, ``train.hooks``: built, and named where they fail."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from detectron2.engine import HookBase
from omegaconf import DictConfig

from ...errors import UserError, first_line
from ..config.make import make

logger = logging.getLogger("dfd")

_METHODS = ("before_train", "before_step", "after_backward", "after_step", "after_train")


def user_hooks(cfg: DictConfig) -> list[HookBase]:
    """The hooks of ``train.hooks``, in their order.

    Raises:
        UserError: one cannot be built, or is no hook. One that fails in training raises it too, and
            its traceback is in the log.
    """
    hooks = []
    for i, node in enumerate(cfg.train.hooks):
        where = f"train.hooks.{i}"
        hook = make(node, where, foreign=True)
        if not isinstance(hook, HookBase):
            raise UserError(
                f"{where} is a {type(hook).__name__}: it must be a hook, derived from "
                "detectron2.engine.HookBase"
            )
        for name in _METHODS:
            named = f"{where} failed in {type(hook).__name__}.{name}"
            setattr(hook, name, _guarded(getattr(hook, name), named))
        hooks.append(hook)
    return hooks


def _guarded(method: Callable[[], Any], what: str) -> Callable[[], Any]:
    """The method, whose errors are one line; the trainer would show a traceback of its own."""

    @functools.wraps(method)
    def guarded() -> Any:
        try:
            return method()
        except UserError:
            raise
        except Exception as error:
            logger.exception(what)
            raise UserError(f"{what}: {type(error).__name__}: {first_line(error)}") from error

    return guarded

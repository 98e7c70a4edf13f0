"""Building what a part of a config describes."""

from __future__ import annotations

import traceback
from typing import Any

from detectron2.config import instantiate
from omegaconf.errors import OmegaConfBaseException

from ...errors import UserError, first_line


def make(node: Any, what: str, *, foreign: bool = False) -> Any:
    """What a part of the config describes.

    Args:
        what: names the part, for the message.
        foreign: whether it is a user's own code, of which any error is told in one line.

    Raises:
        UserError: its function does not exist or refuses what it is given.
    """
    refusals = (TypeError, ValueError, ImportError, OmegaConfBaseException)
    try:
        return instantiate(node)
    except Exception as error:
        if isinstance(error, UserError) or not (foreign or isinstance(error, refusals)):
            raise
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

"""Where the config files are: the caller's own, or those that come with this package."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[2]
# Installed, they are within the package; in a clone, beside projects/.
_PLACES = (_PACKAGE / "configs", _PACKAGE.parents[1] / "configs")


def find_config(path: str) -> str:
    """The file that a user means by ``configs/demo/dfd.py``.

    A file of that name below the current folder wins; else it is looked for among the configs of
    the package, with or without the leading ``configs/``. A path that is nowhere is returned as
    it is.
    """
    path = os.path.expanduser(path)
    if os.path.lexists(path) or os.path.isabs(path):
        return path
    below = Path(path)
    if below.parts[:1] == ("configs",):
        below = below.relative_to("configs")
    for place in _PLACES:
        if (place / below).is_file():
            return str(place / below)
    return path

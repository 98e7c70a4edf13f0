"""What functions and classes are called, in public wherever they are defined."""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any

from .saved import find_object


def plain_values(node: Any) -> Any:
    """A config's content as json can hold it: names in place of functions and classes.

    Anything else goes by the name of its type, as its repr may hold an address.
    """
    if isinstance(node, dict):
        return {str(key): plain_values(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [plain_values(value) for value in node]
    if node is None or isinstance(node, bool | int | float | str):
        return node
    owner = node if hasattr(node, "__qualname__") else type(node)
    return f"{owner.__module__}.{owner.__qualname__}"


def public_name(thing: Any) -> str:
    """The shortest name by which a function or class is found: ``torch.optim.AdamW``.

    It stays where a library moves its private modules. Of anything else, that of its type.
    """
    owner = thing if hasattr(thing, "__qualname__") else type(thing)
    module, name = str(owner.__module__), owner.__qualname__
    parts = module.split(".")
    for count in range(1, len(parts)):
        package = ".".join(parts[:count])
        if _attribute(sys.modules.get(package), name) is owner:
            return f"{package}.{name}"
    return f"{module}.{name}"


def same_thing(before: str, now: str) -> bool:
    """Whether two names are of one function or class, of which the second is there.

    The first may have been the name of a private module that is gone, in the package of the second.
    """
    if before == now:
        return True
    package, _, name = now.rpartition(".")
    # What a file names is not imported but where it may be the same under another module.
    top = before.partition(".")[0]
    if top not in sys.modules and (
        top in sys.stdlib_module_names or not before.endswith(f".{name}")
    ):
        return False
    found, there = _find(before), _find(now)
    if found is not None:
        return found is there
    return there is not None and before.startswith(f"{package}.") and before.endswith(f".{name}")


def _attribute(owner: Any, name: str) -> Any:
    try:
        return functools.reduce(getattr, name.split("."), owner)
    except AttributeError:
        return None


def _find(name: str) -> Any:
    with contextlib.suppress(Exception):  # The module may be there, but not whole.
        return find_object(name)
    return None

"""The command ``dfd``: ``dfd train``, ``dfd eval``, ``dfd ablate`` and so on."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# Each is imported only when it is asked for: most need none of the others' libraries.
COMMANDS = {
    "train": ("dfd.engine.command:train", "train a detector, or evaluate or dry-run its config"),
    "eval": ("dfd.engine.command:evaluate", "evaluate a checkpoint of a config"),
    "ablate": ("dfd.research.ablate.command:main", "compare settings over several seeds"),
    "report": ("dfd.research.command:main", "finished runs side by side, as one page"),
    "analyse": ("dfd.research.analyse.command:main", "where a student and its teacher disagree"),
    "demo": ("dfd.demo.command:main", "the demonstration, from data to report"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; the rest of its line is its own."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print("usage: dfd COMMAND ...\n")
        for command, (_, what) in COMMANDS.items():
            print(f"  dfd {command:9}{what}")
        print("\ndfd COMMAND --help tells the arguments of each.")
        return
    if name not in COMMANDS:
        sys.exit(f"dfd {name}: no such command; there are {', '.join(COMMANDS)}")
    module, _, function = COMMANDS[name][0].partition(":")
    getattr(importlib.import_module(module), function)(arguments[1:])

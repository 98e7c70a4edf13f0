"""The command ``dfd``: ``dfd train``, ``dfd eval``, ``dfd ablate`` and so on."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata

# Each is imported only when it is asked for: most need none of the others' libraries.
COMMANDS = {
    "train": ("dfd.engine.command:train", "train a detector; all that train_net.py does"),
    "eval": ("dfd.engine.command:evaluate", "evaluate a checkpoint of a config"),
    "ablate": ("dfd.research.ablate.command:main", "compare settings over several seeds"),
    "predict": ("dfd.deploy.predict:main", "detect objects on images, folders and videos"),
    "export": ("dfd.deploy.export:main", "write the student as ONNX or for torch.export"),
    "benchmark": ("dfd.deploy.benchmark:main", "time student, teacher and the exported student"),
    "report": ("dfd.research.command:main", "put finished runs side by side on one page"),
    "analyse": ("dfd.research.analyse.command:main", "show where a student and its teacher differ"),
    "demo": ("dfd.demo.command:main", "run the demonstration, from data to report"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; the rest of the line is its own."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        lines = [f"  dfd {command:11}{what}" for command, (_, what) in COMMANDS.items()]
        usage = ["usage: dfd COMMAND ...", "", *lines, "", "dfd COMMAND --help: its arguments"]
        usage.append("dfd --version: the version that is installed")
        print("\n".join(usage))
        return
    if name == "--version":
        try:
            print(f"dfd {metadata.version('dfd')}")
        except metadata.PackageNotFoundError:
            sys.exit("error: dfd is not installed, so it has no version: pip install .")
        return
    if name not in COMMANDS:
        sys.exit(f"error: dfd {name}: no such command; there are {', '.join(COMMANDS)}")
    if "" not in sys.path:
        # A user's own modules beside the caller, as `python -m dfd` finds them.
        sys.path.insert(0, "")
    _quieten_torch()
    module, _, function = COMMANDS[name][0].partition(":")
    getattr(importlib.import_module(module), function)(arguments[1:])


def _quieten_torch() -> None:
    """Hide what torch says of Detectron2's calls: nothing that a user could act on."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", category=FutureWarning, module="timm")
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    warnings.filterwarnings("ignore", message="torch.meshgrid")
    logging.getLogger("torch.fx").setLevel(logging.ERROR)

"""train_net.py, as a command and in this process; tools as modules."""

import importlib.util
import os
import socket
import subprocess
import sys

from dfd.engine import argument_parser, main

_PATH = os.pathsep.join(filter(None, ["tests", os.environ.get("PYTHONPATH")]))
ENV = os.environ | {"PYTHONPATH": _PATH, "OMP_NUM_THREADS": "1"}


def command(config, *arguments):
    """``python train_net.py --config-file config arguments``: the finished process."""
    return subprocess.run(
        [sys.executable, "train_net.py", "--config-file", config, *arguments],
        capture_output=True,
        text=True,
        env=ENV,
    )


def run(config, *arguments):
    """The same without a process of its own; a user's error is a SystemExit."""
    main(argument_parser().parse_args(["--config-file", config, *arguments]))


def load_tool(name):
    """``tools/<name>.py`` as a module."""
    spec = importlib.util.spec_from_file_location(name, f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

"""train_net.py, as a command, forked and in this process; tools as modules."""

import functools
import importlib.util
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from dfd.engine import argument_parser, launch, main

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


def forked(config, *arguments):
    """As ``command``, but of processes that need not import anything, which takes longest.

    They leave a server that has done so, have a session of their own, and fork those of --num-gpus
    where train_net.py would spawn them.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["pytest", "dfd.engine"])
    arguments = ["--config-file", config, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("out", "err")]
        process = server.Process(target=_launch, args=(arguments, paths))
        process.start()
        process.join()
        said = [path.read_text() for path in paths]
    return subprocess.CompletedProcess(arguments, process.exitcode, *said)


def _launch(arguments, paths):
    os.setsid()
    for number, path in enumerate(paths, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    multiple = torch.multiprocessing
    multiple.start_processes = functools.partial(multiple.start_processes, start_method="fork")
    parser = argument_parser()
    parser.set_defaults(dist_url="auto")
    launch(main, parser.parse_args(arguments))


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

"""train_net.py in processes that need not import anything first, which takes them longest."""

import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from dfd.engine import argument_parser, launch, main

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "dfd.engine", "dfd.research", "torch.utils.tensorboard"])


def forked(config, *arguments, env=None):
    """``python train_net.py --config-file config arguments``: the finished process.

    It leaves a server that has imported what it needs, has a session of its own, and forks the
    processes of --num-gpus where train_net.py would spawn them. For the CPU alone.
    """
    arguments = ["--config-file", config, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("out", "err")]
        process = SERVER.Process(target=_launch, args=(arguments, env or {}, paths))
        process.start()
        process.join()
        said = [path.read_text() for path in paths]
    return subprocess.CompletedProcess(arguments, process.exitcode, *said)


class Started:
    """``python -m module arguments`` so: what is used of a subprocess.Popen."""

    def __init__(self, command, *, output=None, env=None):
        with tempfile.TemporaryDirectory() as folder:
            pipe = Path(folder) / "pipe"
            os.mkfifo(pipe)
            path = pipe if output is None else output.name
            self._process = SERVER.Process(target=_run_module, args=(command[2:], path, env or {}))
            self._process.start()
            # Opened once the process has opened it too.
            self.stdout = open(pipe) if output is None else None

    def poll(self):
        return self._process.exitcode

    def wait(self):
        self._process.join()
        return self._process.exitcode

    returncode = property(poll)

    def communicate(self):
        text = self.stdout.read()
        self.wait()
        return text, None


def _run_module(command, output, env):
    _begin([output], env)
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def _begin(outputs, env):
    """One file for standard output and errors, or one for each."""
    os.setsid()
    os.environ.update(env)
    multiple = torch.multiprocessing
    multiple.start_processes = functools.partial(multiple.start_processes, start_method="fork")
    # A pipe is opened once: its folder goes as soon as the reader has opened it too.
    opened = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in outputs]
    os.dup2(opened[0], 1)
    os.dup2(opened[-1], 2)
    torch.set_num_threads(1)


def _launch(arguments, env, paths):
    _begin(paths, env)
    parser = argument_parser()
    parser.set_defaults(dist_url="auto")
    launch(main, parser.parse_args(arguments))

"""``train_net.py``, ``dfd train`` and ``dfd eval``: their flags, read and carried out."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from detectron2.utils import comm

from ..errors import UserError
from . import run
from .arguments import argument_parser, check_modes
from .config.load import load_config
from .launch import end_with, has_lost_another, launch
from .stop import EXIT_STOPPED, Stopped, StopRequest, end_process


def train(arguments: Sequence[str] | None = None, *, epilog: str | None = None) -> None:
    """What ``train_net.py`` does; ``arguments`` are those of the process where they are None."""
    parser = argument_parser(epilog=epilog)
    parser.set_defaults(dist_url="auto")
    launch(main, parser.parse_args(arguments))


def evaluate(arguments: Sequence[str] | None = None) -> None:
    """The same with ``--eval-only``."""
    train(["--eval-only", *(arguments or ())])


def main(args: argparse.Namespace) -> None:
    """One process of a run. A :class:`UserError` becomes one line and exit code 1.

    A training that is told to stop by a signal ends with exit code 75 when it is saved.
    """
    stop = StopRequest()
    try:
        check_modes(args)
        trains = not (args.eval_only or args.eval_teacher or args.dry_run)
        with stop.listening() if trains else contextlib.nullcontext():
            _run(args, stop)
    except Stopped as stopped:
        _end_stopped(stopped)
    except UserError as error:
        end_with(error, comm.get_rank() if comm.get_world_size() > 1 else None)
    except Exception as error:
        if stop.number and comm.get_world_size() > 1 and has_lost_another(error):
            # Most often the other one was ended by the same signal, and has said why.
            end_process(128 + stop.number)
        raise


def _run(args: argparse.Namespace, stop: StopRequest) -> None:
    with run.reference_errors():
        cfg = load_config(args.config_file, args.opts)
    if args.dry_run:
        run.rehearse(cfg, resume=args.resume)
    elif args.eval_teacher:
        run.measure_teacher(cfg)
    elif args.eval_only:
        run.evaluate(cfg)
    else:
        run.train(cfg, resume=args.resume, stop=stop)


def _end_stopped(stopped: Stopped) -> NoReturn:
    if comm.is_main_process():
        print(f"stopped by {stopped}; the same with --resume continues", file=sys.stderr)
    if comm.get_world_size() > 1:
        # The group is not left in good order: another process may be gone.
        end_process(EXIT_STOPPED)
    sys.exit(EXIT_STOPPED)

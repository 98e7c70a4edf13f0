"""The flags of ``train_net.py``: Detectron2's, and this project's beside them."""

from __future__ import annotations

import argparse

from detectron2.engine import default_argument_parser

from ..errors import UserError

_MODES = ("eval_only", "eval_teacher", "dry_run")


def argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Detectron2's parser with the flags that it does not have, which may stand anywhere.

    Detectron2's takes all that follows the first override for overrides, flags too.
    """
    parser = default_argument_parser(epilog=epilog)
    (overrides,) = (action for action in parser._actions if action.dest == "opts")
    overrides.nargs, overrides.default = "*", []
    parser.parse_args = parser.parse_intermixed_args
    parser.add_argument(
        "--eval-teacher", action="store_true", help="evaluate the config's teacher, and stop"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build and check everything, train a few steps, print a table and stop; nothing is "
        "written to train.output_dir",
    )
    return parser


def check_modes(args: argparse.Namespace) -> None:
    """
    Raises:
        UserError: two flags were given of which each is a run of its own.
    """
    given = [f"--{mode.replace('_', '-')}" for mode in _MODES if getattr(args, mode)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other: give one of them")

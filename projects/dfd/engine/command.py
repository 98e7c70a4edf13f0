"""``dfd train`` and ``dfd eval``: the flags of ``train_net.py``, read and carried out."""

from __future__ import annotations

from collections.abc import Sequence

from .arguments import argument_parser
from .launch import launch
from .run import main


def train(arguments: Sequence[str] | None = None, *, epilog: str | None = None) -> None:
    """What ``train_net.py`` does; ``arguments`` are those of the process where they are None."""
    parser = argument_parser(epilog=epilog)
    parser.set_defaults(dist_url="auto")
    launch(main, parser.parse_args(arguments))


def evaluate(arguments: Sequence[str] | None = None) -> None:
    """The same with ``--eval-only``."""
    train(["--eval-only", *(arguments or ())])

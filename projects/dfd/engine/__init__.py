"""Training and evaluation of a LazyConfig, from Python and from the command line::

    from dfd.engine import load_config, train

    cfg = load_config("configs/bccd/dfd.py", ["train.max_iter=100"])
    results = train(cfg)
"""

from .arguments import argument_parser
from .command import main
from .config.load import load_config
from .launch import launch
from .run import evaluate, train

__all__ = ["argument_parser", "evaluate", "launch", "load_config", "main", "train"]

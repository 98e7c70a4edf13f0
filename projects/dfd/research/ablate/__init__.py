"""Settings compared over several seeds: each run a process of its own, the differences paired."""

from .ablation import Ablation
from .cells import find_cell, make_cells, parse_seeds
from .cluster import CLUSTERS, parse_slurm
from .estimates import EMA, FAILED, OPEN, check_metric
from .folders import plan_runs
from .local import UNFINISHED

__all__ = [
    "Ablation",
    "CLUSTERS",
    "EMA",
    "FAILED",
    "OPEN",
    "UNFINISHED",
    "check_metric",
    "find_cell",
    "make_cells",
    "parse_seeds",
    "parse_slurm",
    "plan_runs",
]

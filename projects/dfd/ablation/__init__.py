"""Settings compared over several seeds: each run a process of its own, the differences paired."""

from .cells import find_cell, make_cells, parse_seeds
from .cluster import CLUSTERS, parse_slurm
from .launch import UNFINISHED
from .results import FAILED, OPEN, check_metric
from .runs import plan_runs
from .study import Ablation

__all__ = [
    "Ablation",
    "CLUSTERS",
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

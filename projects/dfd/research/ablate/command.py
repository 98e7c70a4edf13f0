"""Compare settings over several seeds: trains every cell with every seed, and tells what differs.

    dfd ablate --config-file configs/bccd/dfd.py --seeds 0:5 \\
        --grid 'model.head.criterion.lenient_on=[high,low]' --out output/bccd/lenient_on \\
        dataloader.train.dataset.root=BCCD

Writes results.csv, results.md, results.png and results.html to --out. The same command continues
what was stopped. @FILE stands for the arguments in a file, an option and its value a line.
docs/configuration.md tells the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...data import class_names, registered_name
from ...data.text import read_lines
from ...engine.config.find import find_config
from ...engine.config.load import ConfigFile
from ...engine.console import Interrupted, say, stop_on_signals
from ...engine.stop import EXIT_STOPPED
from ...errors import UserError
from . import (
    CLUSTERS,
    EMA,
    FAILED,
    OPEN,
    UNFINISHED,
    Ablation,
    check_metric,
    find_cell,
    make_cells,
    parse_seeds,
    parse_slurm,
    plan_runs,
)

_OF_CLASS = "AP-"


def _of_files(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments, those in a file in the place of its @FILE.

    argparse's own reader of such files knows the locale's encoding alone.

    Raises:
        UserError: a file cannot be read.
    """
    for argument in arguments:
        if not argument.startswith("@"):
            yield argument
            continue
        # The files of arguments that come with the package are found as its configs are.
        for line in read_lines(find_config(argument[1:])):
            yield from _of_files(_of_line(line.strip()))


def _of_line(line: str) -> list[str]:
    """A line of an argument file: an option and its value, taken as they are, or a comment."""
    if not line or line.startswith("#"):
        return []
    option, *value = line.split(maxsplit=1)
    return [option, *value] if option.startswith("--") and "=" not in option else [line]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """
    Raises:
        UserError: a file of arguments cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="dfd ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    path = {"type": os.path.expanduser}
    add("--config-file", **path, required=True, help="the config that every cell starts from")
    add("--out", **path, required=True, metavar="DIR", help="folder of the runs and the results")
    add("--seeds", default="0:3", help="0:5, or 0,3,7 (default: 0:3)")
    add(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=[V,V,...]",
        help="values of one key; repeatable: all combinations are run",
    )
    add(
        "--cell",
        action="append",
        default=[],
        metavar="NAME='KEY=V KEY=V ...'",
        help="a named variant; repeatable",
    )
    add("--baseline", metavar="NAME", help="the cell to compare with (default: the first)")
    add("--metric", default="AP", help="what is compared: AP, AP50, AP-<class>, ema/AP, ...")
    add(
        "--bootstrap",
        type=int,
        default=1000,
        metavar="N",
        help="draws of the test images; 0: no interval over images (default: 1000)",
    )
    add("--parallel", type=int, default=1, metavar="K", help="runs at a time (default: 1)")
    add(
        "--processes",
        type=int,
        default=1,
        metavar="P",
        help="processes of a run, each with a CUDA device where there are some (default: 1)",
    )
    add("--list", action="store_true", help="show cells and places, start nothing")
    add("--cluster", choices=CLUSTERS, help="submit one array of runs through submitit")
    add("--slurm", metavar="'KEY=V ...'", help="submitit's parameters of Slurm")
    add("overrides", nargs="*", metavar="key=value", help="given to every cell")
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_intermixed_args(list(_of_files(given)))
    args.given = [f"@{find_config(a[1:])}" if a.startswith("@") else a for a in given]
    return args


def plan(args: argparse.Namespace) -> Ablation:
    """The ablation that arguments describe; nothing is written.

    Raises:
        UserError: an argument is wrong.
    """
    if args.parallel < 1:
        raise UserError(f"--parallel {args.parallel}: it must be 1 or more")
    if args.processes < 1:
        raise UserError(f"--processes {args.processes}: it must be 1 or more")
    if args.bootstrap < 0:
        raise UserError(f"--bootstrap {args.bootstrap}: it must be 0 or more")
    if args.slurm is not None and args.cluster != "slurm":
        raise UserError("--slurm is given without --cluster slurm")
    check_metric(args.metric)
    cells = make_cells(grids=args.grid, variants=args.cell, overrides=args.overrides)
    out = Path(args.out)
    config = ConfigFile(args.config_file)
    runs = plan_runs(config=config, cells=cells, seeds=parse_seeds(args.seeds), out=out)
    for run in runs if args.metric.startswith(EMA) else ():
        if (run.settings["train"].get("ema") or {}).get("decay") is None:
            raise UserError(
                f"--metric {args.metric}: {run.name} keeps no average: set train.ema.decay, or "
                "compare the students themselves"
            )
    return Ablation(
        config=config,
        out=out,
        cells=cells,
        baseline=find_cell(cells, args.baseline),
        runs=runs,
        metric=args.metric,
        draws=args.bootstrap,
        command=["dfd", "ablate", *args.given],
        parallel=args.parallel,
        processes=args.processes,
        cluster=args.cluster,
        parameters=parse_slurm(args.slurm or "") if args.cluster == "slurm" else {},
    )


def _check_class(metric: str, ablation: Ablation) -> None:
    """Refuse AP of a class that the test data do not have, before all runs are made for it."""
    plain = metric.removeprefix(EMA)
    if not plain.startswith(_OF_CLASS):
        return
    try:
        cfg = ablation.config.load(ablation.cells[0].overrides)
        names = class_names(registered_name(cfg.dataloader.test.dataset))
    except Exception:  # Of whatever reads the data, which may be where the runs are alone.
        return
    if len(names) == 1:
        raise UserError(f"--metric {metric}: the test data have one class, whose AP is AP")
    if plain.removeprefix(_OF_CLASS) not in names:
        raise UserError(f"--metric {metric}: the test data's classes are {', '.join(names)}")


def run(ablation: Ablation) -> None:
    """Make the runs; what failed is told at the end and becomes exit code 1.

    Where none failed but one was told to stop, it is the exit code of such a run.
    """
    outcomes = ablation.execute()
    say("\n" + (ablation.out / "results.md").read_text(encoding="utf-8"))
    say(f"results: {ablation.out / 'results.html'}")
    failed = [outcome for outcome in outcomes if outcome.status == FAILED]
    for outcome in failed:
        print(f"failed: {outcome.run.name}: {outcome.error} ({outcome.run.log})", file=sys.stderr)
    unfinished = [outcome.run.name for outcome in outcomes if outcome.status == OPEN]
    for name in unfinished:
        print(f"not finished: {name} {UNFINISHED}", file=sys.stderr)
    if failed:
        sys.exit(1)
    if unfinished:
        sys.exit(EXIT_STOPPED)


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        args = parse_arguments(arguments)
        stop_on_signals()
        ablation = plan(args)
        if args.list:
            say(ablation.describe())
        else:
            _check_class(args.metric, ablation)
            for doubt in ablation.doubts:
                say(doubt)
            run(ablation)
    except UserError as error:
        sys.exit(f"error: {error}")
    except Interrupted as error:
        # After SIGHUP there is no terminal any more.
        with contextlib.suppress(OSError):
            print(
                f"\nstopped by {error}; what was running has been ended, and goes on with the same "
                "command",
                file=sys.stderr,
            )
        sys.exit(130)

"""Compare finished runs: prints a table and writes one self-contained HTML page.

    dfd report --run teacher=output/demo/teacher --run student=output/demo/student \\
        --run dfd=output/demo/dfd --out output/demo/report.html

The runs may be of any dataset, but must have been tested on the same one. The page at --out is
derived from the runs: one that is already there is replaced.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from ..engine.console import ending_in_one_line
from ..engine.run_folder import load_runs, parse_runs
from .compare import format_text
from .report import write_report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="dfd report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--run",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a finished run's output folder and what to call it; once for each run",
    )
    parser.add_argument(
        "--out", required=True, metavar="HTML", help="the page to write; an older one is replaced"
    )
    parser.add_argument("--title", default="Comparison of runs")
    parser.add_argument(
        "--num-images",
        type=int,
        default=6,
        help="test images to show detections on; 0: the test data are not needed (default: 6)",
    )
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="let the runs' configs name functions and classes of any module: your own",
    )
    args = parser.parse_args(arguments)
    args.out = os.path.expanduser(args.out)
    with ending_in_one_line():
        runs = load_runs(parse_runs(args.run), trusted=args.trust_code)
        print(format_text(runs), flush=True)
        write_report(runs=runs, out=args.out, title=args.title, num_images=args.num_images)
    print(f"\nreport: {args.out}")

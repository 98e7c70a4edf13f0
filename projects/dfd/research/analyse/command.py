"""Where a distilled student and its teacher are apart, and whether the student errs there.

    dfd analyse --run output/bccd/dfd --out output/bccd/disparity

Measures the run's checkpoints on its test data: how disparity is spread over cells, levels, object
sizes and training time, and over detected objects, missed objects and false detections. To see
training time, let the run keep checkpoints (train.checkpointer.period=100). The last arguments are
overrides of the run's config, such as model.teacher.checkpoint=... where the teacher has moved.

--out gets analysis.json (every number), analysis.md (tables), plots,
and index.html (all of it in one file). An earlier analysis there is replaced.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence

from tabulate import tabulate

from ...engine.console import LiveLine, ending_in_one_line
from .analyse import analyse


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    # What it says of a call that fails is told in the error.
    logging.getLogger("detectron2.config.instantiate").setLevel(logging.CRITICAL)
    line = LiveLine(line_every=30)
    with ending_in_one_line():
        try:
            sections = analyse(
                **vars(args), progress=lambda done, total: line.update(f"image {done} of {total}")
            )
        finally:
            line.clear()
    for section in sections:
        for caption, (header, *rows) in section.tables.items():
            print(f"{caption}\n{tabulate(rows, header, disable_numparse=True)}\n")
    print(f"analysis: {os.path.join(args.out, 'index.html')}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dfd analyse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--run",
        required=True,
        type=os.path.expanduser,
        metavar="FOLDER",
        help="the folder of a finished distilled run",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=os.path.expanduser,
        metavar="FOLDER",
        help="where the analysis is written",
    )
    parser.add_argument(
        "--num-images", type=int, help="so many evenly spaced test images (default: all)"
    )
    parser.add_argument(
        "--num-pictures", type=int, default=4, help="images to show with their disparity (4)"
    )
    parser.add_argument(
        "--max-checkpoints",
        type=int,
        default=10,
        help="of a run that kept more, so many evenly spaced ones (10); all are held in memory",
    )
    parser.add_argument(
        "--score", type=float, default=0.5, help="detections count from this score on (0.5)"
    )
    parser.add_argument(
        "--iou", type=float, default=0.5, help="and find a label from this overlap on (0.5)"
    )
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="let the runs' configs name functions and classes of any module: your own",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run's config")
    return parser.parse_intermixed_args(arguments)

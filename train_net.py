#!/usr/bin/env python
"""Train and evaluate detectors from a LazyConfig: teachers, plain students, distilled students.

Flags, overrides and output files are those of Detectron2's own lazy training script:

    python train_net.py --config-file configs/... [--num-gpus N] [--resume] key=value

and --eval-only, --eval-teacher or --dry-run to train nothing.
"""

import sys

from detectron2.engine import launch
from torch.multiprocessing import ProcessExitedException

from dfd.engine import argument_parser, main

if __name__ == "__main__":
    args = argument_parser(epilog=__doc__).parse_args()
    try:
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except ProcessExitedException as error:
        # The process that failed has said why.
        sys.exit(error.exit_code)

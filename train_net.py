#!/usr/bin/env python
"""Train and evaluate detectors from a LazyConfig: teachers, plain students, distilled students.

Flags, overrides and output files are those of Detectron2's own lazy training script:

    python train_net.py --config-file configs/... [--num-gpus N] [--resume] [--eval-only] key=value
"""

from detectron2.engine import default_argument_parser, launch

from dfd.engine import main

if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    args = parser.parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )

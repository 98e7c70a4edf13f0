#!/usr/bin/env python
"""Train and evaluate detectors from a LazyConfig: teachers, plain students, distilled students.

Flags, overrides and output files are those of Detectron2's own lazy training script:

    python train_net.py --config-file configs/... [--num-gpus N] [--resume] key=value

and --eval-only, --eval-teacher or --dry-run to train nothing. torchrun and Slurm's srun start it
too (docs/running.md).
"""

from dfd.engine.command import train

if __name__ == "__main__":
    train(epilog=__doc__)

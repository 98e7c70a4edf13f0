"""The RepPoints teacher of the families: from scratch on 205 labelled images of BCCD.

python train_net.py --config-file configs/study_families/teacher_reppoints.py \
    dataloader.train.dataset.root=BCCD

Hardware: one CPU core, 1200 iterations of 6 images. Result: docs/results.md.
"""

from ..common.models.small_reppoints import small_reppoints
from .base import dataloader, lr_multiplier, optimizer, train

model = small_reppoints(num_blocks=(2, 2, 2, 2), width=32, fpn_channels=64, head_channels=32)
train.max_iter = 1200
train.output_dir = "output/study_families/teacher_reppoints"

"""The plain RepPoints student of the families: 29 labelled images of BCCD, from scratch.

python train_net.py --config-file configs/study_families/student_reppoints.py \
    dataloader.train.dataset.root=BCCD

Hardware: one CPU core, minutes. Result: docs/results.md.
"""

from ..common.models.small_reppoints import small_reppoints
from .base import dataloader, lr_multiplier, optimizer, train

model = small_reppoints(num_blocks=(1, 1, 1, 1), width=16, fpn_channels=64, head_channels=32)
dataloader.train.dataset.num_images = 29
train.max_iter = 400
train.output_dir = "output/study_families/student_reppoints"

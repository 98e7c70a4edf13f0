"""The teacher of the study on BCCD: 12.3 M parameters, from scratch on 205 labelled images.

python train_net.py --config-file configs/study_bccd/teacher.py dataloader.train.dataset.root=BCCD

Hardware: one CPU core, ten minutes. Result: docs/results.md.
"""

from ..common.models.small_faster_rcnn import small_faster_rcnn
from .base import dataloader, lr_multiplier, optimizer, train

model = small_faster_rcnn(num_blocks=(2, 2, 2, 2), width=64, fpn_channels=64, head_channels=256)
train.max_iter = 1500
train.output_dir = "output/study_bccd/teacher"

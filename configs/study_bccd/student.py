"""The plain student of the study on BCCD: 1.4 M parameters, 29 labelled images.

python train_net.py --config-file configs/study_bccd/student.py dataloader.train.dataset.root=BCCD

Hardware: one CPU core, two minutes. Result: docs/results.md.
"""

from ..common.models.small_faster_rcnn import small_faster_rcnn
from .base import dataloader, lr_multiplier, optimizer, train

model = small_faster_rcnn(num_blocks=(1, 1, 1, 1), width=16, fpn_channels=64, head_channels=256)
dataloader.train.dataset.num_images = 29
train.max_iter = 400
train.output_dir = "output/study_bccd/student"

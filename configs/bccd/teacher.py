"""The BCCD teacher: a Faster R-CNN of 15.5 M parameters, from scratch on all 292 images.

python train_net.py --config-file configs/bccd/teacher.py dataloader.train.dataset.root=BCCD

Hardware: one or two CPU cores, 1500 iterations of 6 images. Result: docs/results.md.
"""

from ..common.models.small_faster_rcnn import small_faster_rcnn
from .base import dataloader, lr_multiplier, optimizer, train

model = small_faster_rcnn(num_blocks=(2, 2, 2, 2), width=64, fpn_channels=128, head_channels=512)
train.max_iter = 1500
train.output_dir = "output/bccd/teacher"

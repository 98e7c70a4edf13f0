"""The plain BCCD student: a thin backbone under the teacher's FPN width and heads, 29 images.

python train_net.py --config-file configs/bccd/student.py dataloader.train.dataset.root=BCCD

The case of a user with a good teacher and few labels of their own: a tenth of the images.
Hardware: one CPU core, 500 iterations of 6 images. Result: docs/results.md.
"""

from ..common.models.small_faster_rcnn import small_faster_rcnn
from .base import dataloader, lr_multiplier, optimizer, train

model = small_faster_rcnn(num_blocks=(1, 1, 1, 1), width=16, fpn_channels=128, head_channels=512)
dataloader.train.dataset.num_images = 29
train.max_iter = 500
train.output_dir = "output/bccd/student"

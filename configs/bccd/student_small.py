"""The smallest BCCD student: 0.93 M parameters, all 292 images, nothing of the teacher's shape.

python train_net.py --config-file configs/bccd/student_small.py dataloader.train.dataset.root=BCCD

The case of a user who needs a small detector and has labels enough.
Hardware: one CPU core, 500 iterations of 6 images.
"""

from ..common.models.small_faster_rcnn import small_faster_rcnn
from .base import dataloader, lr_multiplier, optimizer, train

model = small_faster_rcnn(num_blocks=(1, 1, 1, 1), width=16, fpn_channels=64, head_channels=128)
train.max_iter = 500
train.output_dir = "output/bccd/student_small"

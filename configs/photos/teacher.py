"""The teacher on photographs: a Faster R-CNN of 4 M parameters, from scratch.

python train_net.py --config-file configs/photos/teacher.py \
    dataloader.train.dataset.json=train.json dataloader.train.dataset.images=images \
    dataloader.test.dataset.json=val.json dataloader.test.dataset.images=images

Hardware: one CPU core, 3000 iterations of 8 images.
"""

from ..common.models.small_faster_rcnn import small_faster_rcnn
from .base import dataloader, lr_multiplier, optimizer, train

model = small_faster_rcnn(num_blocks=(2, 2, 2, 2), width=32, fpn_channels=64, head_channels=256)
train.max_iter = 3000
train.output_dir = "output/photos/teacher"

"""A plain RepPoints student on photographs, from scratch.

python train_net.py --config-file configs/photos/student_reppoints.py \
    dataloader.train.dataset.json=train.json dataloader.train.dataset.images=images \
    dataloader.test.dataset.json=val.json dataloader.test.dataset.images=images

Hardware: one CPU core, 1000 iterations of 8 images.
"""

from ..common.models.small_reppoints import small_reppoints
from .base import dataloader, lr_multiplier, optimizer, train

model = small_reppoints(num_blocks=(1, 1, 1, 1), width=16, fpn_channels=64, head_channels=32)
train.output_dir = "output/photos/student_reppoints"

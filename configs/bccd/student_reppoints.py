"""A plain RepPoints student on BCCD: 29 labelled images, from scratch.

python train_net.py --config-file configs/bccd/student_reppoints.py \
    dataloader.train.dataset.root=BCCD

Hardware: one CPU core, 500 iterations of 6 images, some ten minutes: deformable convolutions are
slow there.
"""

from ..common.models.small_reppoints import small_reppoints
from .base import dataloader, lr_multiplier, optimizer, train

model = small_reppoints(num_blocks=(1, 1, 1, 1), width=16, fpn_channels=64, head_channels=32)
for _split in ("train", "test"):
    dataloader[_split].mapper.image_format = "auto"  # RGB.
dataloader.train.dataset.num_images = 29
train.max_iter = 500
train.output_dir = "output/bccd/student_reppoints"

"""A plain YOLOX student on BCCD: 0.56 M parameters, 29 labelled images, from scratch.

python train_net.py --config-file configs/bccd/student_yolox.py dataloader.train.dataset.root=BCCD

Hardware: one CPU core, 500 iterations of 6 images, minutes.
"""

from ..common.data.mosaic import use_small_mosaic
from ..common.models.yolox import yolox
from .base import dataloader, lr_multiplier, optimizer, train

model = yolox("nano", num_classes="auto", depthwise=False, width=0.125)
use_small_mosaic(dataloader)
dataloader.train.dataset.num_images = 29
train.max_iter = 500
train.output_dir = "output/bccd/student_yolox"

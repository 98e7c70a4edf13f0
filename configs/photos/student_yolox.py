"""A plain YOLOX student on photographs, from scratch.

python train_net.py --config-file configs/photos/student_yolox.py \
    dataloader.train.dataset.json=train.json dataloader.train.dataset.images=images \
    dataloader.test.dataset.json=val.json dataloader.test.dataset.images=images

Hardware: one CPU core, 1000 iterations of 8 images.
"""

from ..common.data.mosaic import use_small_mosaic
from ..common.models.yolox import yolox
from .base import dataloader, lr_multiplier, optimizer, train

model = yolox("nano", num_classes="auto", depthwise=False, width=0.125)
use_small_mosaic(dataloader)
train.output_dir = "output/photos/student_yolox"

"""The plain YOLOX student of the families: 29 labelled images of BCCD, from scratch.

python train_net.py --config-file configs/study_families/student_yolox.py \
    dataloader.train.dataset.root=BCCD

Hardware: one CPU core, minutes. Result: docs/results.md.
"""

from ..common.data.mosaic import use_small_mosaic
from ..common.models.yolox import yolox
from .base import dataloader, lr_multiplier, optimizer, train

model = yolox("nano", num_classes="auto", depthwise=False, width=0.125)
use_small_mosaic(dataloader)
dataloader.train.dataset.num_images = 29
train.max_iter = 400
train.output_dir = "output/study_families/student_yolox"

"""The YOLOX teacher of the families: from scratch on 205 labelled images of BCCD.

python train_net.py --config-file configs/study_families/teacher_yolox.py \
    dataloader.train.dataset.root=BCCD

Hardware: one CPU core, 1200 iterations of 6 images. Result: docs/results.md.
"""

from ..common.models.yolox import yolox
from .student_yolox import dataloader, lr_multiplier, optimizer, train

model = yolox("nano", num_classes="auto", depthwise=False, width=0.25)
dataloader.train.dataset.num_images = None
train.max_iter = 1200
train.output_dir = "output/study_families/teacher_yolox"

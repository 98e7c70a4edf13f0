"""The plain YOLOX student over timm's EfficientNet-lite0, pretrained on ImageNet.

python train_net.py --config-file configs/study_photos/student_yolox.py \
    dataloader.train.dataset.json=train.json dataloader.train.dataset.images=images \
    dataloader.test.dataset.json=val.json dataloader.test.dataset.images=images

Without a network, name a file of the weights: model.trunk.pretrained=PATH.
Hardware: one CPU core, an hour. Status: docs/results.md.
"""

from ..common.data.mosaic import use_small_mosaic
from ..common.models.timm_trunk import timm_trunk
from ..common.models.yolox import yolox
from .base import dataloader, lr_multiplier, optimizer, train

model = yolox("nano", num_classes="auto", depthwise=False)
model.trunk = timm_trunk("tf_efficientnet_lite0.in1k", levels=("c3", "c4", "c5"))
model.pixel_mean = model.pixel_std = model.input_format = "auto"
use_small_mosaic(dataloader)
train.output_dir = "output/study_photos/student_yolox"

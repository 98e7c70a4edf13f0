"""The plain RepPoints student over timm's EfficientNet-lite0, pretrained on ImageNet.

python train_net.py --config-file configs/study_photos/student_reppoints.py \
    dataloader.train.dataset.json=train.json dataloader.train.dataset.images=images \
    dataloader.test.dataset.json=val.json dataloader.test.dataset.images=images

Without a network, name a file of the weights: model.backbone.bottom_up.pretrained=PATH.
Hardware: one CPU core, an hour. Status: docs/results.md.
"""

from ..common.models.small_reppoints import small_reppoints
from ..common.models.timm_trunk import use_timm_trunk
from .base import dataloader, lr_multiplier, optimizer, train

model = small_reppoints(
    num_blocks=(1, 1, 1, 1), width=16, fpn_channels=64, head_channels=32, num_convs=2
)
use_timm_trunk(model, "tf_efficientnet_lite0.in1k", levels=("c3", "c4", "c5"))
train.output_dir = "output/study_photos/student_reppoints"

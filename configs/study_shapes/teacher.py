"""The teacher of the study on generated shapes: 7.4 M parameters, from scratch on 1500 images.

python train_net.py --config-file configs/study_shapes/teacher.py

Hardware: one CPU core, ten minutes. Result: docs/results.md.
"""

from ..common.models.small_faster_rcnn import small_faster_rcnn
from .base import dataloader, lr_multiplier, optimizer, train

model = small_faster_rcnn(num_blocks=(2, 2, 2, 2), width=48, fpn_channels=64, head_channels=256)
model.backbone.norm = "BN"  # Learns faster from scratch.
train.max_iter = 2000
train.output_dir = "output/study_shapes/teacher"

"""The plain student of the study on generated shapes: 1.4 M parameters, 150 labelled images.

python train_net.py --config-file configs/study_shapes/student.py

Hardware: one CPU core, two minutes. Result: docs/results.md.
"""

from ..common.models.small_faster_rcnn import small_faster_rcnn
from .base import dataloader, lr_multiplier, optimizer, train

model = small_faster_rcnn(num_blocks=(1, 1, 1, 1), width=16, fpn_channels=64, head_channels=256)
model.backbone.norm = "BN"  # As the teacher's.
# Enough for these small images; a step on a CPU takes a third of the time of 128.
model.roi_heads.batch_size_per_image = 32
dataloader.train.dataset.num_images = 150
train.max_iter = 400
train.output_dir = "output/study_shapes/student"

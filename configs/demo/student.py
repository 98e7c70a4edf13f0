"""The demonstration's plain student: a thin backbone, a tenth of the labelled images.

python train_net.py --config-file configs/demo/student.py
"""

from ..common.models.small_faster_rcnn import small_faster_rcnn
from .base import dataloader, lr_multiplier, optimizer, train

model = small_faster_rcnn(num_blocks=(1, 1, 1, 1), width=16, fpn_channels=64, head_channels=256)
model.backbone.norm = "BN"  # Learns faster from scratch.
model.roi_heads.batch_size_per_image = 64
model.proposal_generator.pre_nms_topk = [300, 300]
model.proposal_generator.post_nms_topk = [150, 150]
dataloader.train.dataset.num_images = 150
train.max_iter = 300
train.output_dir = "output/demo/student"

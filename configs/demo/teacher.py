"""The demonstration's teacher, from scratch on all generated training images.

python train_net.py --config-file configs/demo/teacher.py
"""

from ..common.models.small_faster_rcnn import small_faster_rcnn
from .base import dataloader, lr_multiplier, optimizer, train

model = small_faster_rcnn(num_blocks=(2, 2, 2, 2), width=32, fpn_channels=64, head_channels=256)
model.backbone.norm = "BN"  # Learns faster from scratch.
model.roi_heads.batch_size_per_image = 64
model.proposal_generator.pre_nms_topk = [300, 300]
model.proposal_generator.post_nms_topk = [150, 150]
train.max_iter = 800
train.output_dir = "output/demo/teacher"

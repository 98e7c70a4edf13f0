"""What teacher and students of the demonstration share: data, detector, optimizer, schedule.

All of it is chosen for four trainings from scratch in minutes on two CPU cores: small images with
few and large shapes of three classes, and a detector that looks at few proposals.
"""

from ..common.data.shapes import dataloader
from ..common.models.small_faster_rcnn import small_faster_rcnn
from ..common.optim import AdamW as optimizer
from ..common.schedule import cosine as lr_multiplier
from ..common.train import train

dataloader.train.dataset.root = "datasets/demo_shapes"
dataloader.train.dataset.image_size = 96
dataloader.train.dataset.num_train = 1500
dataloader.train.dataset.num_val = 200
dataloader.train.dataset.clutter = 0.0
dataloader.train.dataset.classes = ["circle", "triangle", "cross"]
dataloader.train.total_batch_size = 8
optimizer.lr = 2e-3
for _split in ("train", "test"):
    dataloader[_split].num_workers = 1

train.amp.enabled = "auto"
train.checkpointer.period = 1000
train.eval_period = 0  # At the end only.
train.disparity_images.period = 100


def detector(num_blocks, width):
    """A small Faster R-CNN whose backbone has so many blocks and channels."""
    model = small_faster_rcnn(num_blocks, width=width, fpn_channels=64, head_channels=256)
    model.backbone.norm = "BN"  # Learns faster from scratch.
    model.proposal_generator.batch_size_per_image = 64
    model.proposal_generator.pre_nms_topk = [100, 100]
    model.proposal_generator.post_nms_topk = [60, 60]
    model.roi_heads.batch_size_per_image = 32
    model.roi_heads.box_pooler.output_size = 5
    model.roi_heads.box_pooler.sampling_ratio = 1
    model.roi_heads.box_head.input_shape.height = 5
    model.roi_heads.box_head.input_shape.width = 5
    return model

"""The stock 100-epoch recipe of ViTDet on COCO: large-scale jitter, AdamW, two steps.

Of Detectron2's projects/ViTDet, with one addition: vectors (biases, LayerScale) have no weight
decay either. ``vit.img_size`` sets the size of everything: crop, padding, position embeddings,
windows.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from ..common.data.coco import dataloader
from ..common.optim import AdamW as optimizer
from ..common.train import train

vit = dict(img_size=1024)

_size = "${vit.img_size}"
dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(horizontal=True),
    L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=_size, target_width=_size),
    L(T.FixedSizeCrop)(crop_size=[_size, _size], pad=False),
]
dataloader.train.mapper.use_instance_mask = True
dataloader.train.mapper.recompute_boxes = True  # The crop cuts objects.
dataloader.train.total_batch_size = 64
dataloader.test.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=_size, max_size=_size)
]
for _split in ("train", "test"):
    dataloader[_split].mapper.image_format = "auto"

optimizer.lr = 1e-4
optimizer.weight_decay = 0.1
optimizer.params.lr_decay = 0.7
optimizer.params.weight_decay_1d = 0.0
optimizer.params.weight_decay_pos_embed = 0.0

# 100 epochs = 184375 iterations of 64 images; only the proportions count.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[163889, 177546, 184375]
    ),
    warmup_length=250 / 184375,
    warmup_method="linear",
    warmup_factor=0.001,
)
train.max_iter = 184375
train.amp.enabled = "auto"  # bf16 where the GPU has units for it, else fp32.

"""Detectors with pretrained trunks on photographs in COCO form: data, optimizer, schedule.

Sides of at most 256 pixels. Name the two json files and the two folders of images (which may be
one):

    dataloader.train.dataset.json=train.json dataloader.train.dataset.images=images \
    dataloader.test.dataset.json=val.json dataloader.test.dataset.images=images
"""

from ..common.data.coco_json import dataloader
from ..common.optim import AdamW as optimizer
from ..common.schedule import cosine as lr_multiplier
from ..common.train import train

for _split in ("train", "test"):
    _mapper = dataloader[_split].mapper
    _mapper.augmentations[0].update(short_edge_length=160, max_size=256)
    _mapper.image_format = "auto"
    dataloader[_split].num_workers = 0  # The whole of a run on one core.
dataloader.train.mapper.augmentations[0].short_edge_length = [144, 160, 176]
dataloader.train.total_batch_size = 8

optimizer.lr = 3e-4

train.max_iter = 3000
train.eval_period = 0  # At the end only.
train.checkpointer.period = 500
train.disparity_images.period = 0
train.amp.enabled = "auto"

"""The generated dataset of shapes. Set the folder that it is written to on first use:

dataloader.train.dataset.root=...
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from dfd.demo import generated_shapes

from .loaders import dataloader

dataloader.train.dataset = L(generated_shapes)(
    root="",
    split="train",
    num_train=1000,
    num_val=500,
    image_size=128,
    seed=0,
    clutter=1.0,
    classes=None,
    num_images=None,
    subset_seed=0,
)
dataloader.test.dataset = L(generated_shapes)(
    root="${...train.dataset.root}",
    split="val",
    num_train="${...train.dataset.num_train}",
    num_val="${...train.dataset.num_val}",
    image_size="${...train.dataset.image_size}",
    seed="${...train.dataset.seed}",
    clutter="${...train.dataset.clutter}",
    classes="${...train.dataset.classes}",
    num_images=None,
    subset_seed=0,
)
for _split in ("train", "test"):
    dataloader[_split].mapper.augmentations[0] = L(T.ResizeShortestEdge)(
        short_edge_length="${dataloader.train.dataset.image_size}", max_size=1333
    )
    dataloader[_split].num_workers = 2

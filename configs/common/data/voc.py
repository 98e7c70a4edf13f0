"""A folder laid out like Pascal VOC. Set its path once: dataloader.train.dataset.root=...

Train on a part of it with dataloader.train.dataset.num_images=29.
"""

from detectron2.config import LazyCall as L

from dfd.data import voc_folder

from .loaders import dataloader

dataloader.train.dataset = L(voc_folder)(
    root="",
    split="train",
    classes=None,
    num_images=None,
    subset_seed=0,
    missing_images="error",
    unknown_classes="error",
)
dataloader.train.mapper.augmentations[0].short_edge_length = list(range(480, 801, 32))

dataloader.test.dataset = L(voc_folder)(
    root="${...train.dataset.root}",
    split="val",
    classes="${...train.dataset.classes}",
    num_images=None,
    subset_seed=0,
    missing_images="${...train.dataset.missing_images}",
    unknown_classes="${...train.dataset.unknown_classes}",
)

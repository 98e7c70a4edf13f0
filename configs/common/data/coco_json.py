"""A dataset of your own in COCO form. Set the two json files and the two image folders:

    dataloader.train.dataset.json=... dataloader.train.dataset.images=...
    dataloader.test.dataset.json=... dataloader.test.dataset.images=...

A dataset that detectron2 registers is a plain name instead, with DETECTRON2_DATASETS set:

    dataloader.train.dataset=coco_2017_train dataloader.test.dataset=coco_2017_val
"""

from detectron2.config import LazyCall as L

from dfd.data import coco_json

from .loaders import dataloader

for _split in ("train", "test"):
    dataloader[_split].dataset = L(coco_json)(
        json="",
        images="",
        classes=None,
        num_images=None,
        subset_seed=0,
        missing_images="error",
        unknown_classes="error",
    )

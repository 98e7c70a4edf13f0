"""A dataset of your own in COCO form. Set the two json files and the two image folders:

    dataloader.train.dataset.json=... dataloader.train.dataset.images=...
    dataloader.test.dataset.json=... dataloader.test.dataset.images=...

A dataset that detectron2 registers is a plain name instead, with DETECTRON2_DATASETS set:

    dataloader.train.dataset=coco_2017_train dataloader.test.dataset=coco_2017_val
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper
from omegaconf import OmegaConf

from dfd.data import build_evaluator, build_test_loader, build_train_loader, coco_json

dataloader = OmegaConf.create()

dataloader.train = L(build_train_loader)(
    dataset=L(coco_json)(
        json="",
        images="",
        num_images=None,
        subset_seed=0,
        missing_images="error",
        unknown_classes="error",
    ),
    mapper=L(DatasetMapper)(
        is_train=True,
        augmentations=[
            L(T.ResizeShortestEdge)(
                short_edge_length=(640, 672, 704, 736, 768, 800),
                sample_style="choice",
                max_size=1333,
            ),
            L(T.RandomFlip)(horizontal=True),
        ],
        image_format="BGR",
        use_instance_mask=False,
    ),
    total_batch_size=16,
    num_workers=4,
    seed="${train.seed}",
)

dataloader.test = L(build_test_loader)(
    dataset=L(coco_json)(
        json="",
        images="",
        num_images=None,
        subset_seed=0,
        missing_images="error",
        unknown_classes="error",
    ),
    mapper=L(DatasetMapper)(
        is_train=False,
        augmentations=[L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333)],
        image_format="${...train.mapper.image_format}",
    ),
    num_workers=4,
)

dataloader.evaluator = L(build_evaluator)(dataset="${..test.dataset}", output_dir=None)

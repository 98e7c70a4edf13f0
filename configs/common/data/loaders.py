"""Mappers, loaders and evaluator of every dataset; a file beside this one fills in the datasets."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper
from omegaconf import OmegaConf

from dfd.data import build_evaluator, build_test_loader, build_train_loader

dataloader = OmegaConf.create()

dataloader.train = L(build_train_loader)(
    dataset="???",
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
        instance_mask_format="polygon",
    ),
    total_batch_size=16,
    num_workers=4,
    seed="${train.seed}",
    # Images that are only distilled: a dataset, and how many are added to each batch.
    unlabelled=None,
    unlabelled_batch_size=0,
)

dataloader.test = L(build_test_loader)(
    dataset="???",
    mapper=L(DatasetMapper)(
        is_train=False,
        augmentations=[L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333)],
        image_format="${...train.mapper.image_format}",
    ),
    num_workers=4,
)

dataloader.evaluator = L(build_evaluator)(
    dataset="${..test.dataset}", output_dir=None, kpt_oks_sigmas=None
)

"""The generated dataset of shapes. Set the folder that it is written to on first use:

dataloader.train.dataset.root=...
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper
from omegaconf import OmegaConf

from dfd.data import build_evaluator, build_test_loader, build_train_loader, generated_shapes

dataloader = OmegaConf.create()

dataloader.train = L(build_train_loader)(
    dataset=L(generated_shapes)(
        root="",
        split="train",
        num_train=1000,
        num_val=500,
        image_size=128,
        seed=0,
        clutter=1.0,
        num_images=None,
        subset_seed=0,
    ),
    mapper=L(DatasetMapper)(
        is_train=True,
        augmentations=[
            L(T.ResizeShortestEdge)(
                short_edge_length="${dataloader.train.dataset.image_size}", max_size=1333
            ),
            L(T.RandomFlip)(horizontal=True),
        ],
        image_format="BGR",
        use_instance_mask=False,
    ),
    total_batch_size=16,
    num_workers=2,
    seed="${train.seed}",
)

dataloader.test = L(build_test_loader)(
    dataset=L(generated_shapes)(
        root="${...train.dataset.root}",
        split="val",
        num_train="${...train.dataset.num_train}",
        num_val="${...train.dataset.num_val}",
        image_size="${...train.dataset.image_size}",
        seed="${...train.dataset.seed}",
        clutter="${...train.dataset.clutter}",
        num_images=None,
        subset_seed=0,
    ),
    mapper=L(DatasetMapper)(
        is_train=False,
        augmentations=[
            L(T.ResizeShortestEdge)(
                short_edge_length="${dataloader.train.dataset.image_size}", max_size=1333
            ),
        ],
        image_format="${...train.mapper.image_format}",
    ),
    num_workers=2,
)

dataloader.evaluator = L(build_evaluator)(dataset="${..test.dataset}", output_dir=None)

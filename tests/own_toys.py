"""Toys of this project's own detectors. Apart from the toys that do without it."""

import toys
from detectron2.config import LazyCall as L
from toys import NUM_CLASSES, dense_config, instantiate_seeded

from dfd.modeling import P6P7, YOLOX, RepPoints, RepPointsHead


def reppoints_config():
    backbone = dense_config("retinanet").backbone
    backbone.update(out_channels=64, norm="GN")
    backbone.top_block._target_ = P6P7
    return L(RepPoints)(
        backbone=backbone,
        head=L(RepPointsHead)(
            in_channels=64, num_classes=NUM_CLASSES, feat_channels=16, num_convs=1, norm_groups=4
        ),
        num_classes=NUM_CLASSES,
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
        input_format="RGB",
    )


def yolox_config():
    return L(YOLOX)(depth=0.33, width=0.125, num_classes=NUM_CLASSES)


CONFIGS = {**toys.CONFIGS, "reppoints": reppoints_config, "yolox": yolox_config}


def build(kind="faster_rcnn", seed=0):
    """A toy detector on the CPU with weights from a seed."""
    return instantiate_seeded(CONFIGS[kind](), seed)

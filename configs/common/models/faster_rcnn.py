"""Faster R-CNN with an FPN, as in Detectron2's model zoo, for 80 classes."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock


def faster_rcnn_r50():
    """COCO-Detection/faster_rcnn_R_50_FPN: for weights of MSRA's ResNet-50."""
    model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
    for key in ("mask_in_features", "mask_pooler", "mask_head"):
        del model.roi_heads[key]
    model.backbone.bottom_up.freeze_at = 2
    return model


def faster_rcnn_x101():
    """COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x, which the zoo has as yaml only."""
    model = faster_rcnn_r50()
    # make_default_stages has no argument for the width of the bottlenecks.
    model.backbone.bottom_up.stages = [
        L(ResNet.make_stage)(
            block_class=BottleneckBlock,
            num_blocks=blocks,
            stride_per_block=[1 if stage == 0 else 2] + [1] * (blocks - 1),
            in_channels=64 if stage == 0 else 128 * 2**stage,
            bottleneck_channels=256 * 2**stage,
            out_channels=256 * 2**stage,
            num_groups=32,
            stride_in_1x1=False,
            norm="FrozenBN",
        )
        for stage, blocks in enumerate((3, 4, 23, 3))
    ]
    # Unlike MSRA's ResNets, whose first convolution has absorbed the standard deviation.
    model.pixel_std = [57.375, 57.120, 58.395]
    return model

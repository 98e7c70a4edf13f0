"""Faster R-CNN with an FPN over a basic-block ResNet of any size, from stock Detectron2 parts.

For small images: anchors are half the usual size on every level, and a quarter of the usual
proposals and regions are looked at.
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock


def small_faster_rcnn(num_blocks, width, fpn_channels, head_channels, norm="BN"):
    """
    Args:
        num_blocks: basic blocks in each of the four stages.
        width: channels of the first stage; each later stage has twice as many.
        fpn_channels: channels of every level of the pyramid.
        head_channels: width of the two fully connected layers of the box head.
    """
    model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
    for key in ("mask_in_features", "mask_pooler", "mask_head"):
        del model.roi_heads[key]
    bottom_up = model.backbone.bottom_up
    bottom_up.stem.out_channels = width
    bottom_up.stem.norm = norm
    bottom_up.stages = [
        L(ResNet.make_stage)(
            block_class=BasicBlock,
            num_blocks=blocks,
            stride_per_block=[1 if stage == 0 else 2] + [1] * (blocks - 1),
            in_channels=width * 2 ** max(stage - 1, 0),
            out_channels=width * 2**stage,
            norm=norm,
        )
        for stage, blocks in enumerate(num_blocks)
    ]
    bottom_up.freeze_at = 0
    model.backbone.out_channels = fpn_channels
    model.proposal_generator.head.in_channels = fpn_channels
    model.proposal_generator.anchor_generator.sizes = [[16], [32], [64], [128], [256]]
    model.proposal_generator.pre_nms_topk = [500, 500]
    model.proposal_generator.post_nms_topk = [300, 300]
    model.roi_heads.batch_size_per_image = 128
    model.roi_heads.num_classes = "auto"
    model.roi_heads.box_head.input_shape.channels = fpn_channels
    model.roi_heads.box_head.fc_dims = [head_channels, head_channels]
    model.roi_heads.box_predictor.input_shape.channels = head_channels
    return model

"""Faster R-CNN with an FPN over a basic-block ResNet of any size, from stock Detectron2 parts.

For small images: anchors are half the usual size on every level, and a quarter of the usual
proposals and regions are looked at.
"""

from detectron2 import model_zoo

from .small_trunk import small_trunk


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
    small_trunk(model.backbone, num_blocks, width, fpn_channels, norm)
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

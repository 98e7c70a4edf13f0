"""Mask R-CNN with an FPN, as in Detectron2's model zoo, for 80 classes."""

from detectron2 import model_zoo


def mask_rcnn_r50():
    """COCO-InstanceSegmentation/mask_rcnn_R_50_FPN: for weights of MSRA's ResNet-50."""
    model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
    model.backbone.bottom_up.freeze_at = 2
    return model


def mask_rcnn_r101_lsj():
    """new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ as a frozen teacher.

    Trained from scratch with norms in the FPN and the heads, two convolutions in the RPN and four
    in the box head. Its synchronised norms are plain ones here: the same keys and, in eval mode,
    the same numbers, but they run anywhere, can be folded, and a config with them can be saved as
    yaml (the zoo's holds lambdas).
    """
    model = model_zoo.get_config("new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py").model
    bottom_up = model.backbone.bottom_up
    bottom_up.stem.norm = bottom_up.stages.norm = model.backbone.norm = "BN"
    model.roi_heads.box_head.conv_norm = model.roi_heads.mask_head.conv_norm = "BN"
    return model

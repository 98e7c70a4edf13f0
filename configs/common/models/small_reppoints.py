"""RepPoints with an FPN over a basic-block ResNet of any size, for small images, from scratch."""

from .reppoints import reppoints
from .small_trunk import small_trunk


def small_reppoints(num_blocks, width, fpn_channels, head_channels, num_convs=1, norm="BN"):
    """
    Args:
        num_blocks: basic blocks in each of the four stages.
        width: channels of the first stage; each later stage has twice as many.
        fpn_channels: channels of every level of the pyramid, a multiple of 32 from 64 on.
        head_channels: of the head's convolutions, a multiple of 16.
        num_convs: convolutions in each of the head's towers.
        norm: of the trunk.
    """
    model = reppoints()
    small_trunk(model.backbone, num_blocks, width, fpn_channels, norm)
    model.backbone.top_block.in_channels = width * 8
    model.head.feat_channels = head_channels
    model.head.norm_groups = 8
    model.head.num_convs = num_convs
    model.num_classes = "auto"
    return model

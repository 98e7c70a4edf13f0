"""A basic-block ResNet of any size under the FPN of a model of Detectron2's zoo."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock


def small_trunk(backbone, num_blocks, width, fpn_channels, norm="BN"):
    """Turn the ResNet-50 of an FPN's config into a smaller one, from scratch.

    Args:
        backbone: the FPN's config, which is changed.
        num_blocks: basic blocks in each of the four stages.
        width: channels of the first stage; each later stage has twice as many.
        fpn_channels: channels of every level of the pyramid.
    """
    bottom_up = backbone.bottom_up
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
    backbone.out_channels = fpn_channels

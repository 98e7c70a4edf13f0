"""RepPoints with an FPN, as in mmdet's model zoo, for 80 classes."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock

from dfd.modeling import P6P7, DeformConvBlock, RepPoints, RepPointsHead


def reppoints(
    depth=50,
    norm="GN",
    num_groups=1,
    width_per_group=64,
    deformable=False,
    trunk_norm="FrozenBN",
):
    """RepPoints R<depth> with the moment transform: for torchvision's weights of ResNets.

    ``reppoints(101, num_groups=32, width_per_group=4, deformable=True)`` is X101-32x4d-DCN.

    Args:
        depth: 50, 101 or 152.
        norm: of the FPN and of the head; "" for mmdet's models without.
        num_groups, width_per_group: of the 3x3 convolutions of a ResNeXt's first stage.
        deformable: those of the last three stages are deformable.
        trunk_norm: "FrozenBN" or "BN". mmdet's trunks have frozen statistics but train the affine
            part, which neither does.
    """
    num_blocks = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}[depth]
    levels = ["res3", "res4", "res5"]
    return L(RepPoints)(
        backbone=L(FPN)(
            bottom_up=L(ResNet)(
                stem=L(BasicStem)(in_channels=3, out_channels=64, norm=trunk_norm),
                stages=[
                    L(ResNet.make_stage)(
                        block_class=DeformConvBlock if deformable and stage else BottleneckBlock,
                        num_blocks=blocks,
                        stride_per_block=[1 if stage == 0 else 2] + [1] * (blocks - 1),
                        in_channels=64 if stage == 0 else 128 * 2**stage,
                        bottleneck_channels=num_groups * width_per_group * 2**stage,
                        out_channels=256 * 2**stage,
                        num_groups=num_groups,
                        stride_in_1x1=False,
                        norm=trunk_norm,
                    )
                    for stage, blocks in enumerate(num_blocks)
                ],
                out_features=levels,
                freeze_at=2,
            ),
            in_features=levels,
            out_channels=256,
            norm=norm,
            top_block=L(P6P7)(in_channels=2048, out_channels="${..out_channels}", norm=norm),
        ),
        head=L(RepPointsHead)(
            in_channels="${..backbone.out_channels}",
            num_classes="${..num_classes}",
            feat_channels=256,
            num_convs=3,
            num_points=9,
            transform="moment",
            norm=norm,
        ),
        num_classes=80,
        pixel_mean=[123.675, 116.280, 103.530],
        pixel_std=[58.395, 57.120, 57.375],
        input_format="RGB",
    )

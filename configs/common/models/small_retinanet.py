"""RetinaNet with an FPN over a basic-block ResNet of any size, from stock Detectron2 parts.

For small images and from scratch: anchors are half the usual size on every level, and the towers
are short and have norms.
"""

from detectron2 import model_zoo

from .small_trunk import small_trunk


def small_retinanet(num_blocks, width, fpn_channels, num_convs=2, norm="BN"):
    """
    Args:
        num_blocks: basic blocks in each of the four stages.
        width: channels of the first stage; each later stage has twice as many.
        fpn_channels: channels of every level of the pyramid, and of the head.
        num_convs: convolutions of each of the head's towers.
    """
    model = model_zoo.get_config("common/models/retinanet.py").model
    small_trunk(model.backbone, num_blocks, width, fpn_channels, norm)
    model.backbone.top_block.in_channels = width * 8
    model.head.conv_dims = [fpn_channels] * num_convs
    model.head.norm = "GN"
    for shape in model.head.input_shape:
        shape.channels = fpn_channels
    model.anchor_generator.sizes = [
        [side * 2 ** (octave / 3) for octave in range(3)] for side in (16, 32, 64, 128, 256)
    ]
    model.num_classes = "auto"
    return model

"""RepPoints small enough to step in a test."""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.structures import Boxes, Instances

from dfd.modeling import P6P7, RepPoints, RepPointsHead

NUM_CLASSES = 3


class FixedFeatures(Backbone):
    """A backbone that puts out what it was given, whatever the images are."""

    def __init__(self, features, strides):
        super().__init__()
        self.features = features
        self.shapes = {
            f"p{i}": ShapeSpec(channels=feature.shape[1], stride=stride)
            for i, (feature, stride) in enumerate(zip(features, strides, strict=True))
        }

    def forward(self, images):
        return dict(zip(self.shapes, self.features, strict=True))

    def output_shape(self):
        return self.shapes


def detector(backbone, head, **settings):
    return RepPoints(
        backbone=backbone,
        head=head,
        num_classes=head.num_classes,
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
        **settings,
    )


def over_features(features, strides, **head):
    """A detector that is little more than its head."""
    channels = features[0].shape[1]
    return detector(FixedFeatures(features, strides), RepPointsHead(channels, NUM_CLASSES, **head))


def small_detector(norm="GN", head=None, **settings):
    """A whole detector, levels p3 to p7."""
    torch.manual_seed(0)
    stages = [
        ResNet.make_stage(
            BasicBlock, 1, stride_per_block=[1 + (i > 0)], in_channels=c, out_channels=d, norm="BN"
        )
        for i, (c, d) in enumerate(((4, 4), (4, 8), (8, 16), (16, 32)))
    ]
    levels = ["res3", "res4", "res5"]
    trunk = ResNet(BasicStem(3, 4, norm="BN"), stages, out_features=levels)
    backbone = FPN(trunk, levels, 64, norm=norm, top_block=P6P7(32, 64, norm=norm))
    head = RepPointsHead(
        64, NUM_CLASSES, feat_channels=32, num_convs=1, norm=norm, norm_groups=8, **(head or {})
    )
    return detector(backbone, head, **settings)


def item(height, width, boxes=(), classes=None, seed=0):
    """An image of a batch; boxes None: without labels."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    record = {"image": image, "height": height, "width": width}
    if boxes is not None:
        boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        classes = torch.zeros(len(boxes)) if classes is None else torch.as_tensor(classes)
        record["instances"] = Instances(
            (height, width), gt_boxes=Boxes(boxes), gt_classes=classes.long()
        )
    return record


BOXES = [[8.0, 12.0, 40.0, 50.0], [30.0, 4.0, 62.0, 60.0], [50.0, 40.0, 58.0, 47.0]]


def batch(boxes=BOXES):
    return [item(64, 90, boxes, range(len(boxes))), item(50, 64, boxes[:1], seed=1)]

"""Detectors of every supported kind, small enough to step in a test, and batches for them."""

from __future__ import annotations

import copy
import functools

import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.structures import BitMasks, Boxes, Instances
from torch import nn

NUM_CLASSES = 3
MODELS = "common/models"


@functools.cache
def _zoo_model(name):
    return model_zoo.get_config(f"{MODELS}/{name}.py").model


def zoo_model(name):
    """The zoo's config of a model, to be changed."""
    return copy.deepcopy(_zoo_model(name))


def shrink_backbone(backbone, width=4, channels=8, norm="BN"):
    """Turn a zoo FPN over ResNet-50 into one over four basic blocks."""
    bottom_up = backbone.bottom_up
    bottom_up.stem.out_channels = width
    bottom_up.stem.norm = norm
    bottom_up.stages = [
        L(ResNet.make_stage)(
            block_class=BasicBlock,
            num_blocks=1,
            stride_per_block=[1 if i == 0 else 2],
            in_channels=width * 2 ** max(i - 1, 0),
            out_channels=width * 2**i,
            norm=norm,
        )
        for i in range(4)
    ]
    bottom_up.freeze_at = 0
    backbone.out_channels = channels


def faster_rcnn_config(channels=8, masks=False, **kwargs):
    model = zoo_model("mask_rcnn_fpn")
    shrink_backbone(model.backbone, channels=channels, **kwargs)
    model.proposal_generator.head.in_channels = channels
    model.proposal_generator.anchor_generator.sizes = [[8], [16], [32], [64], [128]]
    model.proposal_generator.pre_nms_topk = [50, 50]
    model.proposal_generator.post_nms_topk = [20, 20]
    model.proposal_generator.batch_size_per_image = 16
    heads = model.roi_heads
    heads.num_classes = NUM_CLASSES
    heads.batch_size_per_image = 16
    heads.box_head.input_shape.channels = channels
    heads.box_head.fc_dims = [16]
    heads.box_predictor.input_shape.channels = 16
    if masks:
        heads.mask_head.input_shape.channels = channels
        heads.mask_head.conv_dims = [8, 8]
    else:
        for key in ("mask_in_features", "mask_pooler", "mask_head"):
            del heads[key]
    return model


def keypoint_rcnn_config(num_keypoints=5):
    model, heads = faster_rcnn_config(), zoo_model("keypoint_rcnn_fpn").roi_heads
    for key in ("keypoint_in_features", "keypoint_pooler", "keypoint_head"):
        model.roi_heads[key] = heads[key]
    head = model.roi_heads.keypoint_head
    head.input_shape.channels = 8
    head.conv_dims = [8]
    head.num_keypoints = num_keypoints
    return model


def resnext_config():
    """Faster R-CNN over bottleneck blocks of grouped convolutions."""
    model = faster_rcnn_config()
    model.backbone.bottom_up.stages = [
        L(ResNet.make_stage)(
            block_class=BottleneckBlock,
            num_blocks=1,
            stride_per_block=[1 if i == 0 else 2],
            in_channels=4 if i == 0 else 4 * 2**i,
            bottleneck_channels=4,
            num_groups=2,
            out_channels=8 * 2**i,
            norm="BN",
        )
        for i in range(4)
    ]
    return model


def cascade_rcnn_config():
    model = zoo_model("cascade_rcnn")
    base = faster_rcnn_config()
    model.backbone = base.backbone
    model.proposal_generator = base.proposal_generator
    heads = model.roi_heads
    for key in ("mask_in_features", "mask_pooler", "mask_head"):
        heads.pop(key, None)
    heads.num_classes = NUM_CLASSES
    heads.batch_size_per_image = 16
    for box_head in heads.box_heads:
        box_head.input_shape.channels = 8
        box_head.fc_dims = [16]
    for predictor in heads.box_predictors:
        predictor.input_shape.channels = 16
        predictor.num_classes = NUM_CLASSES
    return model


def dense_config(name):
    """RetinaNet or FCOS."""
    model = zoo_model(name)
    shrink_backbone(model.backbone)
    model.backbone.top_block.in_channels = 8 if name == "fcos" else 32
    model.num_classes = NUM_CLASSES
    model.head.input_shape = [L(ShapeSpec)(channels=8)] * 5
    model.head.conv_dims = [8]
    if name == "fcos":
        model.head.norm = ""
    else:
        model.anchor_generator.sizes = [[x, x * 1.26, x * 1.59] for x in (8, 16, 32, 64, 128)]
    return model


CONFIGS = {
    "faster_rcnn": faster_rcnn_config,
    "mask_rcnn": lambda: faster_rcnn_config(masks=True),
    "cascade_rcnn": cascade_rcnn_config,
    "retinanet": lambda: dense_config("retinanet"),
    "fcos": lambda: dense_config("fcos"),
}


def build(kind="faster_rcnn", seed=0):
    """A toy detector on the CPU with weights from a seed."""
    torch.manual_seed(seed)
    return instantiate(CONFIGS[kind]())


def instantiate_seeded(config, seed=0):
    torch.manual_seed(seed)
    return instantiate(config)


def make_batch(sizes=((64, 96), (80, 64)), seed=0, masks=False):
    """A labelled batch: images (3,H,W) uint8, two boxes each."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for height, width in sizes:
        instances = Instances((height, width))
        boxes = torch.tensor([[4.0, 6, 30, 40], [20, 10, width - 2, 50]])
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.tensor([0, 2])
        if masks:
            bits = torch.zeros(2, height, width, dtype=torch.bool)
            for mask, (x0, y0, x1, y1) in zip(bits, boxes.int().tolist(), strict=True):
                mask[y0:y1, x0:x1] = True
            instances.gt_masks = BitMasks(bits)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def part_of_parameters(model, model_part):
    """The parameters of a model whose names begin so, as an optimizer's ``params``."""
    return [p for name, p in model.named_parameters() if name.startswith(model_part)]


def adapter_with_a_spare(in_channels, out_channels):
    """An adapter with a parameter that takes no part in what it puts out."""
    adapter = nn.Conv2d(in_channels, out_channels, 1)
    adapter.spare = nn.Parameter(torch.zeros(1))
    return adapter


def save_checkpoint(model, path):
    torch.save({"model": model.state_dict()}, path)
    return str(path)

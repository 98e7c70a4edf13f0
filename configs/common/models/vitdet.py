"""ViTDet (Li et al., ECCV 2022): detectors over a plain ViT and a simple feature pyramid.

Of Detectron2's model zoo for its own ViT, and over any plain ViT of timm. ``vit`` in a config that
uses them is the one place where the size of images is set: crop, padding, position embeddings and
windows follow it.
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNConvFCHead, FastRCNNOutputLayers

from dfd.modeling import SimplePyramid, TimmViT, layer_norm

from .small_faster_rcnn import small_faster_rcnn

# The zoo's (projects/ViTDet): Mask R-CNN with box AP 51.6, Cascade Mask R-CNN with 54.0.
VITDET_B = "detectron2://ViTDet/COCO/mask_rcnn_vitdet_b/f325346929/model_final_61ccd1.pkl"
CASCADE_VITDET_B = (
    "detectron2://ViTDet/COCO/cascade_mask_rcnn_vitdet_b/f325358525/model_final_435fa9.pkl"
)

_SIZE = "${vit.img_size}"


def mask_rcnn_vitdet():
    """The zoo's Mask R-CNN ViTDet-B, over Detectron2's ViT, for 80 classes.

    ``net.img_size`` stays 1024 whatever the images are: the relative positions of the zoo's
    checkpoints have that size, and are resized as an image needs.
    """
    model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    # The same network, which also tells Detectron2 what images must be padded to.
    model.backbone._target_ = SimplePyramid
    model.backbone.net.norm_layer = layer_norm  # The zoo's is a partial, which yaml cannot hold.
    model.backbone.square_pad = _SIZE
    return model


def timm_mask_rcnn_vitdet(model_name, **net):
    """Mask R-CNN ViTDet over a plain ViT of timm; its pixels' statistics are the timm model's.

    Args:
        model_name: timm's, see ``dfd.modeling.TimmViT``.
        net: more of its settings.
    """
    model = mask_rcnn_vitdet()
    model.backbone = simple_pyramid(model_name, 256, **net)
    return _auto_pixels(model)


def cascade(model):
    """Turn a Mask R-CNN ViTDet into the zoo's Cascade Mask R-CNN ViTDet."""
    for key in ("box_head", "box_predictor", "proposal_matcher"):
        del model.roi_heads[key]
    model.roi_heads.update(
        _target_=CascadeROIHeads,
        box_heads=[
            L(FastRCNNConvFCHead)(
                input_shape=L(ShapeSpec)(channels=256, height=7, width=7),
                conv_dims=[256, 256, 256, 256],
                fc_dims=[1024],
                conv_norm="LN",
            )
            for _ in range(3)
        ],
        box_predictors=[
            L(FastRCNNOutputLayers)(
                input_shape=L(ShapeSpec)(channels=1024),
                test_score_thresh=0.05,
                box2box_transform=L(Box2BoxTransform)(weights=weights),
                cls_agnostic_bbox_reg=True,
                num_classes="${...num_classes}",
            )
            for weights in ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15))
        ],
        proposal_matchers=[
            L(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False)
            for iou in (0.5, 0.6, 0.7)
        ],
    )
    return model


def small_timm_vitdet(model_name, out_channels, head_channels, **net):
    """Faster R-CNN over a small plain ViT of timm, with the heads of ``small_faster_rcnn``."""
    model = small_faster_rcnn((1, 1, 1, 1), 16, out_channels, head_channels)
    model.backbone = simple_pyramid(model_name, out_channels, **net)
    return _auto_pixels(model)


def simple_pyramid(model_name, out_channels, scale_factors=(4.0, 2.0, 1.0, 0.5), **net):
    """ViTDet's pyramid over a plain ViT of timm: p2 to p6 for patches of 16 pixels."""
    return L(SimplePyramid)(
        net=L(TimmViT)(model_name=model_name, img_size=_SIZE, **net),
        out_channels=out_channels,
        scale_factors=scale_factors,
        top_block=L(LastLevelMaxPool)(),
        norm="LN",
        square_pad=_SIZE,
    )


def _auto_pixels(model):
    model.pixel_mean = model.pixel_std = model.input_format = "auto"
    return model

"""A trunk of timm under a small detector of this folder, with ImageNet's weights."""

from detectron2.config import LazyCall as L

from dfd.modeling import TimmPyramid


def timm_trunk(model_name, levels=("c2", "c3", "c4", "c5"), pretrained=True):
    """Batch norms are constant and everything up to c2 is frozen, as in Detectron2's model zoo.

    Args:
        model_name: as in ``timm.list_models()``.
        levels: those that the detector takes.
        pretrained: True: timm's own weights, by download; a path: a local file of them.
    """
    return L(TimmPyramid)(
        model_name=model_name,
        out_features=list(levels),
        pretrained=pretrained,
        norm="FrozenBN",
        freeze_at=2,
    )


def use_timm_trunk(model, model_name, levels=("c2", "c3", "c4", "c5")):
    """Put a timm model under the FPN of a detector's config, in place.

    Pixels are normalised as the timm model wants them. Levels that are coarser than the trunk's
    are made from the FPN's p5, whose channels are known here.
    """
    backbone = model.backbone
    backbone.bottom_up = timm_trunk(model_name, levels)
    backbone.in_features = list(levels)
    if "in_channels" in backbone.top_block:
        backbone.top_block.update(in_feature="p5", in_channels="${..out_channels}")
    model.pixel_mean = model.pixel_std = model.input_format = "auto"
    return model

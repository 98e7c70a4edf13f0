"""Toy detectors over a ViT. Apart from the toys that do without this project."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import ViT
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from toys import faster_rcnn_config

from dfd.modeling import SimplePyramid, TimmViT


def simple_pyramid(net, channels=8, **settings):
    return L(SimplePyramid)(
        net=net,
        out_channels=channels,
        scale_factors=(4.0, 2.0, 1.0, 0.5),
        top_block=L(LastLevelMaxPool)(),
        norm="LN",
        **settings,
    )


def timm_vit_config(model_name="vit_tiny_patch16_224", width=32, img_size=64, **settings):
    """The toy Faster R-CNN over a tiny ViT of timm, one block in windows and one global."""
    model = faster_rcnn_config()
    net = L(TimmViT)(
        model_name=model_name,
        img_size=img_size,
        window_size=2,
        global_blocks=1,
        model_args={"embed_dim": width, "depth": 2, "num_heads": 2},
    )
    model.backbone = simple_pyramid(net, **settings)
    return model


def detectron2_vit_config(**settings):
    """The same over Detectron2's ViT."""
    model = faster_rcnn_config()
    net = L(ViT)(
        img_size=64,
        embed_dim=24,
        depth=2,
        num_heads=2,
        window_size=2,
        window_block_indexes=[0],
        use_rel_pos=True,
    )
    model.backbone = simple_pyramid(net, **settings)
    return model

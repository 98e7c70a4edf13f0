"""Foundation models as teachers: backbones without a detector, with timm's weights."""

from detectron2.config import LazyCall as L

from dfd import FrozenBackbone
from dfd.modeling import TimmViT


def dinov2_small(img_size):
    """DINOv2 ViT-S. Its patches of 14 pixels are resampled to 16, the grid of stride 16.

    Args:
        img_size: the usual side of the images, in pixels.
    """
    return vit_teacher("vit_small_patch14_dinov2.lvd142m", img_size)


def vit_teacher(model_name, img_size):
    """A plain ViT of timm, attending globally in every block, with its last norm."""
    return L(FrozenBackbone)(
        backbone=L(TimmViT)(
            model_name=model_name,
            img_size=img_size,
            pretrained=True,
            window_size=0,
            final_norm=True,
        ),
        pixel_mean="auto",
        pixel_std="auto",
        input_format="auto",
    )

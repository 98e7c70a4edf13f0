"""A Faster R-CNN whose stages learn from the tokens of a bare ViT, with weights of a file."""

from detectron2.config import LazyCall as L

from dfd import DFDHead, DistilledDetector, FrozenBackbone
from dfd.losses import DFDLoss
from dfd.modeling import TimmViT

from .student import dataloader, lr_multiplier, optimizer, train
from .student import model as _student

model = L(DistilledDetector)(
    student=_student,
    teacher=L(FrozenBackbone)(
        backbone=L(TimmViT)(
            model_name="vit_tiny_patch16_224",
            img_size=96,
            window_size=0,
            model_args=dict(embed_dim=32, depth=2, num_heads=2),
            pretrained=True,  # A file, in tests.
        ),
        pixel_mean="auto",
        pixel_std="auto",
        input_format="auto",
    ),
    head=L(DFDHead)(criterion=L(DFDLoss)(), trunk=True),
)

"""The ViT teacher on BCCD: ViT-Ti, 12 blocks of width 192, 4 of them global, 10.0 M parameters.

python train_net.py --config-file configs/bccd/teacher_vit.py dataloader.train.dataset.root=BCCD

From scratch on all 292 images. Hardware: one CPU core, 1000 iterations of 6 images, 25 minutes.
Result: docs/results.md.
"""

from ..common.models.vitdet import small_timm_vitdet
from .base_vit import dataloader, lr_multiplier, optimizer, train, vit

model = small_timm_vitdet(
    "vit_tiny_patch16_224", out_channels=128, head_channels=512, window_size=7
)
train.max_iter = 1000
train.output_dir = "output/bccd/teacher_vit"

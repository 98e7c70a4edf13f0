"""The plain ViT student on BCCD: 6 blocks of width 96, 2 of them global, 1.9 M parameters.

python train_net.py --config-file configs/bccd/student_vit.py dataloader.train.dataset.root=BCCD

From scratch on all 292 images. Hardware: one CPU core, 500 iterations of 6 images, six minutes.
Result: docs/results.md.
"""

from ..common.models.vitdet import small_timm_vitdet
from .base_vit import dataloader, lr_multiplier, optimizer, train, vit

model = small_timm_vitdet(
    "vit_tiny_patch16_224",
    out_channels=64,
    head_channels=256,
    window_size=7,
    global_blocks=2,
    model_args=dict(embed_dim=96, depth=6, num_heads=3),
)
train.max_iter = 500
train.output_dir = "output/bccd/student_vit"

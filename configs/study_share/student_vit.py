"""The plain ViT student under a CNN and under a ViT: 205 labelled images of BCCD, from scratch.

python train_net.py --config-file configs/study_share/student_vit.py \
    dataloader.train.dataset.root=BCCD

Hardware: one CPU core, minutes. Result: docs/results.md.
"""

from ..bccd.student_vit import dataloader, lr_multiplier, model, optimizer, train, vit

dataloader.train.dataset.split = "train"
dataloader.test.dataset.split = "val"
train.max_iter = 300
train.disparity_images.period = 0
train.output_dir = "output/study_share/student_vit"

"""The demonstration's student with the same start as under DFD, but without distillation.

python train_net.py --config-file configs/demo/inherit.py

Needs the teacher's checkpoint (configs/demo/teacher.py).
"""

from .dfd import dataloader, lr_multiplier, model, optimizer, train

model.head.weight = 0
train.disparity_images.period = 0
train.output_dir = "output/demo/inherit"

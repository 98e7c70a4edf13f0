"""The demonstration's teacher, from scratch on all generated training images.

python train_net.py --config-file configs/demo/teacher.py
"""

from .base import dataloader, detector, lr_multiplier, optimizer, train

model = detector(num_blocks=(2, 2, 2, 2), width=32)
train.max_iter = 400
train.output_dir = "output/demo/teacher"

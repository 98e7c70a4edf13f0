"""The demonstration's plain student: a thin backbone, a tenth of the labelled images.

python train_net.py --config-file configs/demo/student.py
"""

from .base import dataloader, detector, lr_multiplier, optimizer, train

model = detector(num_blocks=(1, 1, 1, 1), width=16)
dataloader.train.dataset.num_images = 150
train.max_iter = 300
train.output_dir = "output/demo/student"

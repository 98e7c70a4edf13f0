"""The authors' recipe on COCO, which all sizes share: mosaic, mixup, changing sizes, EMA.

300 epochs of 64 images (8 GPUs of 8). nano and tiny differ in sizes and augmentations.
"""

from ..common.data.coco import dataloader
from ..common.data.mosaic import use_mosaic
from ..common.optim import NesterovSGD as optimizer
from ..common.schedule import yolox as lr_multiplier
from ..common.train import train

use_mosaic(dataloader)
dataloader.train.total_batch_size = 64
dataloader.train.filter_empty = False  # As the authors: images without objects are tiles too.

train.max_iter = 554400  # 300 epochs of 1848 iterations.
train.ema.update(decay=0.9998, warmup=2000)
train.eval_period = 18480  # Ten epochs.
train.checkpointer.period = 18480

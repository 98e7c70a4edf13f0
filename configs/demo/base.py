"""What teacher and students of the demonstration share: generated data, optimizer, schedule."""

from ..common.data.shapes import dataloader
from ..common.optim import AdamW as optimizer
from ..common.schedule import cosine as lr_multiplier
from ..common.train import train

dataloader.train.dataset.root = "datasets/shapes"
dataloader.train.dataset.num_train = 1500
dataloader.train.dataset.num_val = 250
# As hard as a detector can learn from scratch in minutes.
dataloader.train.dataset.clutter = 0.2
dataloader.train.total_batch_size = 8
optimizer.lr = 1e-3
for _split in ("train", "test"):
    dataloader[_split].num_workers = 1

train.amp.enabled = "auto"
train.checkpointer.period = 1000
train.eval_period = 0  # At the end only.
train.disparity_images.period = 100

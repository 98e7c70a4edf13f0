"""What the runs of the study on generated shapes share: data, optimizer, schedule.

Settings are chosen on validation images drawn with another seed (the default here); the final
table is made on those of the dataset itself, dataloader.test.dataset.seed=0
dataloader.test.dataset.root=datasets/shapes.
"""

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
dataloader.test.dataset.seed = 1
dataloader.test.dataset.root = "datasets/shapes_tuning"

optimizer.lr = 1e-3
for _split in ("train", "test"):
    dataloader[_split].num_workers = 1

train.checkpointer.period = 1000
train.eval_period = 0  # At the end only.
train.amp.enabled = True  # Twice as fast on a CPU with bf16 units.
train.disparity_images.period = 0

"""What teacher and students on BCCD share: data, optimizer, schedule.

BCCD (github.com/Shenggan/BCCD_Dataset): 364 photographs of blood cells, 3 classes, Pascal VOC
form. Name its folder with dataloader.train.dataset.root=...
"""

from ..common.data.voc import dataloader
from ..common.optim import AdamW as optimizer
from ..common.schedule import cosine as lr_multiplier
from ..common.train import train

dataloader.train.dataset.split = "trainval"
dataloader.test.dataset.split = "test"
# A third of 640 x 480, so that a run takes minutes on a CPU.
for _split in ("train", "test"):
    dataloader[_split].mapper.augmentations[0].short_edge_length = 160
    dataloader[_split].num_workers = 1
dataloader.train.total_batch_size = 6

train.checkpointer.period = 500
train.eval_period = 0  # At the end only.
train.disparity_images.period = 250

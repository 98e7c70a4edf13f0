"""What the runs of the families of detectors share: data, optimizer, schedule.

Settings are chosen on the validation split of BCCD (the default here); the table is made on the
test split, dataloader.test.dataset.split=test.
"""

from ..bccd.base import dataloader, lr_multiplier, optimizer, train

dataloader.train.dataset.split = "train"
dataloader.test.dataset.split = "val"
for _split in ("train", "test"):
    dataloader[_split].mapper.image_format = "auto"  # RepPoints takes RGB, the others BGR.
    dataloader[_split].num_workers = 0  # The whole of a run on one core.

train.disparity_images.period = 0

"""What the BCCD runs of the study share: data, optimizer, schedule.

Teacher and students see the training split alone. Settings are chosen on the validation split
(the default here); the final table is made on the test split, dataloader.test.dataset.split=test.
"""

from ..bccd.base import dataloader, lr_multiplier, optimizer, train

dataloader.train.dataset.split = "train"
dataloader.test.dataset.split = "val"

train.amp.enabled = True  # Twice as fast on a CPU with bf16 units.
train.disparity_images.period = 0

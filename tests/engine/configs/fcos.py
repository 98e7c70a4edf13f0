from toys import dense_config

from .student import dataloader, lr_multiplier, optimizer, train

model = dense_config("fcos")
model.num_classes = "auto"

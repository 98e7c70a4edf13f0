from detectron2.config import LazyCall as L
from toys import part_of_parameters

from .student import dataloader, lr_multiplier, model, optimizer, train

optimizer.params = L(part_of_parameters)(model_part="")

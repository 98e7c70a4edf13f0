from toys import adapter_with_a_spare

from .dfd import dataloader, lr_multiplier, model, optimizer, train

model.head.adapter = adapter_with_a_spare

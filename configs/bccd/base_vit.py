"""What ViTs on BCCD share: the data of base.py at one size, which ``vit.img_size`` sets."""

from .base import dataloader, lr_multiplier, optimizer, train

vit = dict(img_size=224)  # Pixels of the longer side, which images are padded to.

for _split in ("train", "test"):
    _mapper = dataloader[_split].mapper
    _mapper.augmentations[0].update(short_edge_length="${vit.img_size}", max_size="${vit.img_size}")
    _mapper.image_format = "auto"
optimizer.params.weight_decay_1d = 0.0
optimizer.params.weight_decay_pos_embed = 0.0
train.amp.enabled = "auto"

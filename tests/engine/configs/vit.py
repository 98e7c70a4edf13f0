"""A ViT of timm under a CNN that sees images twice as large, tokens distilled too."""

from vit_toys import timm_vit_config

from dfd.data import TwoSizeMapper

from .dfd import criteria, dataloader, lr_multiplier, model, optimizer, train

model.student = timm_vit_config()
model.student.roi_heads.num_classes = "auto"
model.student.pixel_mean = model.student.pixel_std = model.student.input_format = "auto"
model.teacher.scale = 2.0
model.head.trunk = True
for _split in ("train", "test"):
    dataloader[_split].mapper.update(
        _target_=TwoSizeMapper, teacher_scale="${model.teacher.scale}", image_format="auto"
    )
    dataloader[_split].mapper.augmentations[0].short_edge_length = 128
train.disparity_images.period = 1

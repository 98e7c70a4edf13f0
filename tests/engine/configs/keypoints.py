from toys import keypoint_rcnn_config

from .student import dataloader, lr_multiplier, optimizer, train

model = keypoint_rcnn_config()
model.roi_heads.num_classes = "auto"
dataloader.train.mapper.use_keypoint = True
dataloader.train.mapper.augmentations.pop()  # The flip.

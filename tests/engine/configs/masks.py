from toys import faster_rcnn_config

from .student import dataloader, lr_multiplier, optimizer, train

model = faster_rcnn_config(masks=True)
model.roi_heads.num_classes = "auto"
dataloader.train.mapper.use_instance_mask = True

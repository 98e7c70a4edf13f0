from toys import faster_rcnn_config

from ....configs.common.data.coco_json import dataloader
from ....configs.common.optim import AdamW as optimizer
from ....configs.common.schedule import cosine as lr_multiplier
from ....configs.common.train import train

model = faster_rcnn_config()
model.roi_heads.num_classes = "auto"
for _split in ("train", "test"):
    dataloader[_split].mapper.augmentations[0].short_edge_length = 64
    dataloader[_split].num_workers = 0
dataloader.train.total_batch_size = 2
train.max_iter = 4
train.log_period = 1
train.eval_period = 0
train.device = "cpu"
train.checkpointer.period = 2
train.disparity_images.num_images = 1

"""The plain student: Mask R-CNN R50-FPN on COCO, 2x, without a teacher.

export DETECTRON2_DATASETS=...  # The folder that holds coco/.
python train_net.py --config-file configs/mask_rcnn/student_r50_2x.py --num-gpus 8

Hardware: 8 GPUs, 180000 iterations of 16 images. Not run here: needs COCO and GPUs.
"""

from ..common.data.coco import dataloader
from ..common.models.mask_rcnn import mask_rcnn_r50
from ..common.optim import SGD as optimizer
from ..common.schedule import coco_2x as lr_multiplier
from ..common.train import train

model = mask_rcnn_r50()
dataloader.train.mapper.use_instance_mask = True
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.max_iter = 180000
train.output_dir = "output/mask_rcnn/student_r50_2x"

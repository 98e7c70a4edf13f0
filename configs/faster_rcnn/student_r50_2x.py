"""The plain student: Faster R-CNN R50-FPN on COCO, 2x, without a teacher.

export DETECTRON2_DATASETS=...  # The folder that holds coco/.
python train_net.py --config-file configs/faster_rcnn/student_r50_2x.py --num-gpus 8

Hardware: 8 GPUs, 180000 iterations of 16 images. Not run here: needs COCO and GPUs.
"""

from ..common.data.coco import dataloader
from ..common.models.faster_rcnn import faster_rcnn_r50
from ..common.optim import SGD as optimizer
from ..common.schedule import coco_2x as lr_multiplier
from ..common.train import train

model = faster_rcnn_r50()
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.max_iter = 180000
train.output_dir = "output/faster_rcnn/student_r50_2x"

"""The plain student: YOLOX-tiny on COCO, 300 epochs, without a teacher.

Its authors reached 32.8 AP on val2017.

export DETECTRON2_DATASETS=...  # The folder that holds coco/.
python train_net.py --config-file configs/yolox/student_tiny.py --num-gpus 8

Hardware: 8 GPUs, 554400 iterations of 64 images. Not run here: needs COCO and GPUs.
"""

from ..common.data.mosaic import use_milder_mosaic
from ..common.models.yolox import yolox
from .base import dataloader, lr_multiplier, optimizer, train

model = yolox("tiny")
use_milder_mosaic(dataloader)
train.output_dir = "output/yolox/student_tiny"

"""The plain student: RetinaNet R50-FPN on COCO, 2x, without a teacher.

export DETECTRON2_DATASETS=...  # The folder that holds coco/.
python train_net.py --config-file configs/retinanet/student_r50_2x.py --num-gpus 8

Hardware: 8 GPUs, 180000 iterations of 16 images. Not run here: needs COCO and GPUs.
"""

from ..common.data.coco import dataloader
from ..common.models.retinanet import retinanet
from ..common.optim import SGD as optimizer
from ..common.schedule import coco_2x as lr_multiplier
from ..common.train import train

model = retinanet(depth=50)
optimizer.lr = 0.01
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.max_iter = 180000
train.output_dir = "output/retinanet/student_r50_2x"

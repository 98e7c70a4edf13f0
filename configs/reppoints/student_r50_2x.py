"""The plain student: RepPoints R50-GN on COCO, 2x, without a teacher.

export DETECTRON2_DATASETS=...  # The folder that holds coco/.
python train_net.py --config-file configs/reppoints/student_r50_2x.py --num-gpus 8

The recipe of the authors' GN config (moment, 2x; theirs reached 38.6 AP): SGD of 0.01 at 16 images,
dropped at 16 and 22 of 24 epochs, gradients clipped at 35. One thing differs: the affine part of
the trunk's frozen norms, which theirs trains, stays as it is (``trunk_norm`` of
configs/common/models/reppoints.py).

Hardware: 8 GPUs, 24 epochs of 16 images. Not run here: needs COCO and GPUs.
"""

from ..common.data.coco import dataloader
from ..common.models.reppoints import reppoints
from ..common.optim import SGD as optimizer
from ..common.schedule import reppoints_2x as lr_multiplier
from ..common.train import train

model = reppoints(depth=50)
for _split in ("train", "test"):
    dataloader[_split].mapper.image_format = "RGB"
dataloader.train.mapper.augmentations[0].short_edge_length = [800]
optimizer.lr = 0.01
train.clip_grad_norm = 35.0
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.max_iter = 175920  # 24 epochs of the 117266 images of train2017 that have objects.
train.output_dir = "output/reppoints/student_r50_2x"

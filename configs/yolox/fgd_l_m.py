"""YOLOX-m under YOLOX-l by FGD, as published: dfd_l_m.py but for the criterion and where it is.

python train_net.py --config-file configs/yolox/fgd_l_m.py --num-gpus 8 \
    model.teacher.checkpoint=path/to/yolox_l.pth

After the stems of the heads, with the published weights. Its authors went from 45.9 to 46.6 AP, on
mmdetection's recipe.

Hardware: 8 GPUs, 554400 iterations of 64 images. Not run here: needs COCO and GPUs.
"""

from .dfd_l_m import criteria, dataloader, lr_multiplier, model, optimizer, train

model.head.criterion = "${criteria.fgd}"
model.head.stems = True
model.head.level_weights = "equal"
train.output_dir = "output/yolox/fgd_l_m"

"""YOLOX-s under YOLOX-l on COCO, 300 epochs.

export DETECTRON2_DATASETS=...  # The folder that holds coco/.
python train_net.py --config-file configs/yolox/dfd_l_s.py --num-gpus 8 \
    model.teacher.checkpoint=path/to/yolox_l.pth

The teacher is the authors' (49.7 AP on val2017 by their account): their file is loaded as it is,
and mmdetection's too. What is distilled is the outputs of the path aggregation.

Hardware: 8 GPUs, 554400 iterations of 64 images. Not run here: needs COCO and GPUs.
"""

from detectron2.config import LazyCall as L

from dfd import DFDHead, DistilledDetector, FrozenTeacher
from dfd.losses import DFDLoss

from ..common.criteria import yolox as criteria
from ..common.models.yolox import yolox
from .student_s import dataloader, lr_multiplier, optimizer, train
from .student_s import model as _student

model = L(DistilledDetector)(
    student=_student,
    teacher=L(FrozenTeacher)(model=yolox("l"), checkpoint=""),
    head=L(DFDHead)(criterion=L(DFDLoss)()),
)
train.output_dir = "output/yolox/dfd_l_s"

"""YOLOX under RepPoints, on mosaics of changing sizes, with L1 loss and EMA at the end."""

from detectron2.config import LazyCall as L
from own_toys import reppoints_config, yolox_config

from dfd import DFDHead, DistilledDetector, FrozenTeacher
from dfd.data import closing_batch
from dfd.losses import DFDLoss

from ....configs.common.data.mosaic import use_mosaic
from .student import dataloader, lr_multiplier, optimizer, train

_student, _teacher = yolox_config(), reppoints_config()
for _model in (_student, _teacher):
    _model.num_classes = "auto"
_teacher.head.num_classes = "auto"
_student.l1_from_iter = L(closing_batch)(max_iter="${train.max_iter}", closing=0.5)
model = L(DistilledDetector)(
    student=_student,
    teacher=L(FrozenTeacher)(model=_teacher, allow_random=True),
    head=L(DFDHead)(criterion=L(DFDLoss)()),
)
use_mosaic(dataloader, size=64, sizes=[64, 96], mixup_probability=0.5, scale=(0.5, 1.5))
dataloader.train.mapper.size_period.iterations = 1
dataloader.train.mapper.off_from_batch.closing = 0.5
train.ema.update(decay=0.9, warmup=2)

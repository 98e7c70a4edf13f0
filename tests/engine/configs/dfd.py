from detectron2.config import LazyCall as L

from dfd import DFDHead, DistilledDetector, FrozenTeacher
from dfd.losses import DFDLoss

from ....configs.common.criteria import faster_rcnn as criteria
from .student import dataloader, lr_multiplier, optimizer, train
from .student import model as _student
from .teacher import model as _teacher

model = L(DistilledDetector)(
    student=_student,
    teacher=L(FrozenTeacher)(model=_teacher, checkpoint=""),
    head=L(DFDHead)(criterion=L(DFDLoss)()),
)

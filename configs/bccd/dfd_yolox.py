"""The YOLOX student on BCCD under the Faster R-CNN teacher: another kind of detector.

python train_net.py --config-file configs/bccd/dfd_yolox.py dataloader.train.dataset.root=BCCD

Needs the teacher's checkpoint (configs/bccd/teacher.py). Hardware and length as the plain
student's. The families are compared in configs/study_families.
"""

from detectron2.config import LazyCall as L

from dfd import DFDHead, DistilledDetector, FrozenTeacher
from dfd.losses import DFDLoss

from ..common.criteria import yolox as criteria
from .student_yolox import dataloader, lr_multiplier, optimizer, train
from .student_yolox import model as _student
from .teacher import model as _teacher

model = L(DistilledDetector)(
    student=_student,
    teacher=L(FrozenTeacher)(model=_teacher, checkpoint="output/bccd/teacher/model_final.pth"),
    head=L(DFDHead)(criterion=L(DFDLoss)()),
)
train.output_dir = "output/bccd/dfd_yolox"

"""The ViT student on BCCD under the ViT teacher, through a 1x1 adapter on every level.

python train_net.py --config-file configs/bccd/dfd_vit.py dataloader.train.dataset.root=BCCD

Needs the teacher's checkpoint (configs/bccd/teacher_vit.py). Hardware and length as the plain
student's. Result: docs/results.md.
"""

from detectron2.config import LazyCall as L

from dfd import DFDHead, DistilledDetector, FrozenTeacher
from dfd.losses import DFDLoss

from ..common.criteria import faster_rcnn as criteria
from .student_vit import dataloader, lr_multiplier, optimizer, train, vit
from .student_vit import model as _student
from .teacher_vit import model as _teacher

model = L(DistilledDetector)(
    student=_student,
    teacher=L(FrozenTeacher)(model=_teacher, checkpoint="output/bccd/teacher_vit/model_final.pth"),
    # A twentieth of the default weight: chosen on validation data, see docs/results.md.
    head=L(DFDHead)(criterion=L(DFDLoss)(weight=0.25)),
)
train.output_dir = "output/bccd/dfd_vit"

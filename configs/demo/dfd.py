"""The demonstration's student under DFD: the plain student's run with a teacher beside it.

python train_net.py --config-file configs/demo/dfd.py

Needs the teacher's checkpoint (configs/demo/teacher.py).
"""

from detectron2.config import LazyCall as L

from dfd import DFDHead, DistilledDetector, FrozenTeacher
from dfd.losses import DFDLoss

from ..common.criteria import faster_rcnn as criteria
from .student import dataloader, lr_multiplier, optimizer, train
from .student import model as _student
from .teacher import model as _teacher

model = L(DistilledDetector)(
    student=_student,
    teacher=L(FrozenTeacher)(model=_teacher, checkpoint="output/demo/teacher/model_final.pth"),
    head=L(DFDHead)(criterion=L(DFDLoss)()),
    inherit=["fpn_output", "proposal_generator", "heads"],
)
train.output_dir = "output/demo/dfd"

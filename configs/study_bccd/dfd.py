"""The student of the study on BCCD with a teacher beside it.

python train_net.py --config-file configs/study_bccd/dfd.py dataloader.train.dataset.root=BCCD

Needs the teacher's checkpoint (configs/study_bccd/teacher.py). Another criterion:
model.head.criterion='${criteria.pkd}'. Inheritance alone: model.head.weight=0.
Hardware: one CPU core, three minutes. Result: docs/results.md.
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
    teacher=L(FrozenTeacher)(
        model=_teacher, checkpoint="output/study_bccd/teacher/model_final.pth"
    ),
    # No limit to the gradient, and lenient throughout: the published table was made so.
    head=L(DFDHead)(criterion=L(DFDLoss)(leniency=1.0), gradient_share=None),
    inherit=["fpn_output", "proposal_generator", "heads"],
)
train.output_dir = "output/study_bccd/dfd"

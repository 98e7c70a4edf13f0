"""The RepPoints student of the families under a teacher of its own kind; others by an override.

python train_net.py --config-file configs/study_families/dfd_reppoints.py \
    dataloader.train.dataset.root=BCCD model.teacher='${teachers.retinanet}'

Needs the teacher's checkpoint (configs/study_families/teacher_reppoints.py). Nothing is
inherited, so that an own and another kind of teacher give the same: features. Hardware: one CPU
core, minutes. Result: docs/results.md.
"""

from detectron2.config import LazyCall as L

from dfd import DFDHead, DistilledDetector
from dfd.losses import DFDLoss

from ..common.criteria import reppoints as criteria
from .base_teachers import teachers
from .student_reppoints import dataloader, lr_multiplier, optimizer, train
from .student_reppoints import model as _student

model = L(DistilledDetector)(
    student=_student,
    teacher=teachers["reppoints"],
    # No limit to the gradient, and lenient throughout: the published table was made so.
    head=L(DFDHead)(criterion=L(DFDLoss)(leniency=1.0), gradient_share=None),
)
train.output_dir = "output/study_families/dfd_reppoints"

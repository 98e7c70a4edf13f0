"""The Faster R-CNN student over EfficientNet-lite0 under one over lite2, DFD's defaults.

python train_net.py --config-file configs/study_photos/dfd_faster_rcnn.py \
    dataloader.train.dataset.json=train.json dataloader.train.dataset.images=images \
    dataloader.test.dataset.json=val.json dataloader.test.dataset.images=images

Needs the teacher's checkpoint (configs/study_photos/teacher.py). Without a network, name a file of
the student's weights: model.student.backbone.bottom_up.pretrained=PATH.
Hardware: one CPU core, minutes. Result: docs/results.md.
"""

from detectron2.config import LazyCall as L

from dfd import DFDHead, DistilledDetector, FrozenTeacher
from dfd.losses import DFDLoss

from ..common.criteria import faster_rcnn as criteria
from .student_faster_rcnn import dataloader, lr_multiplier, optimizer, train
from .student_faster_rcnn import model as _student
from .teacher import model as _teacher

model = L(DistilledDetector)(
    student=_student,
    teacher=L(FrozenTeacher)(
        model=_teacher, checkpoint="output/study_photos/teacher/model_final.pth"
    ),
    head=L(DFDHead)(criterion=L(DFDLoss)()),
)
train.output_dir = "output/study_photos/dfd_faster_rcnn"

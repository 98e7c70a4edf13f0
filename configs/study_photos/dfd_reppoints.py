"""The RepPoints student over EfficientNet-lite0 under YOLOX-nano, DFD by its defaults.

python train_net.py --config-file configs/study_photos/dfd_reppoints.py \
    dataloader.train.dataset.json=train.json dataloader.train.dataset.images=images \
    dataloader.test.dataset.json=val.json dataloader.test.dataset.images=images

Needs the teacher's published weights, model.teacher.checkpoint=yolox_nano.pth, or another teacher:
model.teacher='${teachers.faster_rcnn}'. Without a network, name a file of the student's weights:
model.student.backbone.bottom_up.pretrained=PATH.
Hardware: one CPU core, an hour. Status: docs/results.md.
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
    teacher=teachers["yolox_nano"],
    head=L(DFDHead)(criterion=L(DFDLoss)()),
)
train.output_dir = "output/study_photos/dfd_reppoints"

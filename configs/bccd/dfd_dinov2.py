"""The CNN student on BCCD whose res4 learns from DINOv2-S, a backbone without detector.

python train_net.py --config-file configs/bccd/dfd_dinov2.py dataloader.train.dataset.root=BCCD

timm downloads the teacher's weights; without a network name a file of them:
model.teacher.backbone.pretrained=PATH. Hardware and length as the plain student's. Not run with
DINOv2's weights, which could not be had where this was written.
"""

from detectron2.config import LazyCall as L

from dfd import DFDHead, DistilledDetector
from dfd.losses import DFDLoss

from ..common.criteria import faster_rcnn as criteria
from ..common.models.foundation import dinov2_small
from .student import dataloader, lr_multiplier, optimizer, train
from .student import model as _student

model = L(DistilledDetector)(
    student=_student,
    teacher=dinov2_small(224),
    head=L(DFDHead)(criterion=L(DFDLoss)(), trunk=True),
)
train.output_dir = "output/bccd/dfd_dinov2"

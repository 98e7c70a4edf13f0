"""The ViT student on BCCD whose tokens learn from those of DINOv2-S, a backbone without detector.

python train_net.py --config-file configs/bccd/dfd_dinov2_vit.py dataloader.train.dataset.root=BCCD

timm downloads the teacher's weights; without a network name a file of them:
model.teacher.backbone.pretrained=PATH. Hardware and length as the plain student's. Not run with
DINOv2's weights, which could not be had where this was written.
"""

from detectron2.config import LazyCall as L

from dfd import DFDHead, DistilledDetector
from dfd.losses import DFDLoss

from ..common.criteria import faster_rcnn as criteria
from ..common.models.foundation import dinov2_small
from .student_vit import dataloader, lr_multiplier, optimizer, train, vit
from .student_vit import model as _student

model = L(DistilledDetector)(
    student=_student,
    teacher=dinov2_small("${vit.img_size}"),
    head=L(DFDHead)(criterion=L(DFDLoss)(), trunk=True),
)
train.output_dir = "output/bccd/dfd_dinov2_vit"

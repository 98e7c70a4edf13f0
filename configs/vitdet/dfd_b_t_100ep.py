"""Mask R-CNN ViTDet-T under the model zoo's ViTDet-B on COCO, 100 epochs.

export DETECTRON2_DATASETS=...  # The folder that holds coco/.
python train_net.py --config-file configs/vitdet/dfd_b_t_100ep.py --num-gpus 8

The teacher (box AP 51.6 by the zoo) is fetched on first use, and so are the student's weights;
model.student.backbone.net.pretrained=FILE takes them from a file. Baselines: docs/method.md.
Hardware: 8 GPUs, 184375 iterations of 64 images of 1024 pixels. Not run here: needs COCO and GPUs.
"""

from detectron2.config import LazyCall as L

from dfd import DFDHead, DistilledDetector, FrozenTeacher
from dfd.losses import DFDLoss

from ..common.criteria import mask_rcnn as criteria
from ..common.models.vitdet import VITDET_B, mask_rcnn_vitdet
from .student_t_100ep import dataloader, lr_multiplier, optimizer, train, vit
from .student_t_100ep import model as _student

model = L(DistilledDetector)(
    student=_student,
    teacher=L(FrozenTeacher)(model=mask_rcnn_vitdet(), checkpoint=VITDET_B),
    head=L(DFDHead)(criterion=L(DFDLoss)()),
)
train.output_dir = "output/vitdet/dfd_b_t_100ep"

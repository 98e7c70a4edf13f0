"""Faster R-CNN R50-FPN under X101-32x8d-FPN on COCO, 2x.

export DETECTRON2_DATASETS=...  # The folder that holds coco/.
python train_net.py --config-file configs/faster_rcnn/dfd_x101_r50_2x.py --num-gpus 8

The teacher is the model zoo's, fetched on first use. It differs from the student in its trunk and
its pixel statistics; all that is inherited has the same shapes on either side.

Hardware: 8 GPUs, 180000 iterations of 16 images. Not run here: needs COCO and GPUs.
"""

from detectron2.config import LazyCall as L

from dfd import DFDHead, DistilledDetector, FrozenTeacher
from dfd.losses import DFDLoss

from ..common.criteria import faster_rcnn as criteria
from ..common.models.faster_rcnn import faster_rcnn_x101
from .student_r50_2x import dataloader, lr_multiplier, optimizer, train
from .student_r50_2x import model as _student

model = L(DistilledDetector)(
    student=_student,
    teacher=L(FrozenTeacher)(
        model=faster_rcnn_x101(),
        checkpoint="detectron2://COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x/"
        "139173657/model_final_68b088.pkl",
    ),
    head=L(DFDHead)(criterion=L(DFDLoss)()),
    inherit=["fpn_output", "proposal_generator", "heads"],
)
train.output_dir = "output/faster_rcnn/dfd_x101_r50_2x"

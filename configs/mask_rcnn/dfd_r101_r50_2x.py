"""Mask R-CNN R50-FPN under R101-FPN (400 epochs of large-scale jitter) on COCO, 2x.

export DETECTRON2_DATASETS=...  # The folder that holds coco/.
python train_net.py --config-file configs/mask_rcnn/dfd_r101_r50_2x.py --num-gpus 8

The teacher is the model zoo's, fetched on first use. Nothing is inherited: in its FPN and heads it
has norms where the stock student has biases, so half of a layer would be copied; its RPN and box
head have other layers.

Hardware: 8 GPUs, 180000 iterations of 16 images. Not run here: needs COCO and GPUs.
"""

from detectron2.config import LazyCall as L

from dfd import DFDHead, DistilledDetector, FrozenTeacher
from dfd.losses import DFDLoss

from ..common.criteria import mask_rcnn as criteria
from ..common.models.mask_rcnn import mask_rcnn_r101_lsj
from .student_r50_2x import dataloader, lr_multiplier, optimizer, train
from .student_r50_2x import model as _student

model = L(DistilledDetector)(
    student=_student,
    teacher=L(FrozenTeacher)(
        model=mask_rcnn_r101_lsj(),
        checkpoint="detectron2://new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ/"
        "42073830/model_final_f96b26.pkl",
    ),
    head=L(DFDHead)(criterion=L(DFDLoss)()),
)
train.output_dir = "output/mask_rcnn/dfd_r101_r50_2x"

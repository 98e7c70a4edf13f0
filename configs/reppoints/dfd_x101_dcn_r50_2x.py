"""RepPoints R50-GN under X101-32x4d-DCN on COCO, 2x.

export DETECTRON2_DATASETS=...  # The folder that holds coco/.
python train_net.py --config-file configs/reppoints/dfd_x101_dcn_r50_2x.py --num-gpus 8 \
    model.teacher.checkpoint=path/to/reppoints_moment_x101_fpn_dconv_c3-c5_gn-neck+head_2x_coco.pth

The teacher is mmdetection's (44.2 AP by its account): its file is loaded as it is. Neck and head of
the student start from it, as in FGD and MGD.

Hardware: 8 GPUs, 24 epochs of 16 images. Not run here: needs COCO and GPUs.
"""

from detectron2.config import LazyCall as L

from dfd import DFDHead, DistilledDetector, FrozenTeacher
from dfd.losses import DFDLoss

from ..common.criteria import reppoints as criteria
from ..common.models.reppoints import reppoints
from .student_r50_2x import dataloader, lr_multiplier, optimizer, train
from .student_r50_2x import model as _student

model = L(DistilledDetector)(
    student=_student,
    teacher=L(FrozenTeacher)(
        model=reppoints(depth=101, num_groups=32, width_per_group=4, deformable=True),
        checkpoint="",
    ),
    head=L(DFDHead)(criterion=L(DFDLoss)()),
    inherit=["fpn_output", "heads"],
)
train.output_dir = "output/reppoints/dfd_x101_dcn_r50_2x"

"""RetinaNet R50-FPN under R101-FPN on COCO, 2x.

export DETECTRON2_DATASETS=...  # The folder that holds coco/.
python train_net.py --config-file configs/retinanet/dfd_r101_r50_2x.py --num-gpus 8

The teacher is the model zoo's, fetched on first use. It differs from the student in the depth of
its trunk; all that is inherited has the same shapes on either side.

Hardware: 8 GPUs, 180000 iterations of 16 images. Not run here: needs COCO and GPUs.
"""

from detectron2.config import LazyCall as L

from dfd import DFDHead, DistilledDetector, FrozenTeacher
from dfd.losses import DFDLoss

from ..common.criteria import retinanet as criteria
from ..common.models.retinanet import retinanet
from .student_r50_2x import dataloader, lr_multiplier, optimizer, train
from .student_r50_2x import model as _student

model = L(DistilledDetector)(
    student=_student,
    teacher=L(FrozenTeacher)(
        model=retinanet(depth=101),
        checkpoint="detectron2://COCO-Detection/retinanet_R_101_FPN_3x/"
        "190397697/model_final_971ab9.pkl",
    ),
    head=L(DFDHead)(criterion=L(DFDLoss)()),
    inherit=["fpn_output", "heads"],
)
train.output_dir = "output/retinanet/dfd_r101_r50_2x"

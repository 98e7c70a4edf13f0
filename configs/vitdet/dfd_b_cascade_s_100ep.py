"""dfd_b_s_100ep.py with Cascade R-CNN heads on both sides. Not run here: needs COCO and GPUs.

export DETECTRON2_DATASETS=...  # The folder that holds coco/.
python train_net.py --config-file configs/vitdet/dfd_b_cascade_s_100ep.py --num-gpus 8

The teacher is the zoo's Cascade Mask R-CNN ViTDet-B (box AP 54.0 by the zoo).
"""

from ..common.models.vitdet import CASCADE_VITDET_B, cascade
from .dfd_b_s_100ep import criteria, model
from .student_cascade_s_100ep import dataloader, lr_multiplier, optimizer, train, vit
from .student_cascade_s_100ep import model as _student

model.student = _student
model.teacher.model = cascade(model.teacher.model)
model.teacher.checkpoint = CASCADE_VITDET_B
train.output_dir = "output/vitdet/dfd_b_cascade_s_100ep"

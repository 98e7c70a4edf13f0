"""dfd_b_s_100ep.py with ViTDet-T as the student. Not run here: needs COCO and GPUs.

export DETECTRON2_DATASETS=...  # The folder that holds coco/.
python train_net.py --config-file configs/vitdet/dfd_b_t_100ep.py --num-gpus 8
"""

from .dfd_b_s_100ep import criteria, model
from .student_t_100ep import dataloader, lr_multiplier, optimizer, train, vit
from .student_t_100ep import model as _student

model.student = _student
train.output_dir = "output/vitdet/dfd_b_t_100ep"

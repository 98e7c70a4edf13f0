"""student_s_100ep.py with Cascade R-CNN heads. Not run here: needs COCO and GPUs.

export DETECTRON2_DATASETS=...  # The folder that holds coco/.
python train_net.py --config-file configs/vitdet/student_cascade_s_100ep.py --num-gpus 8
"""

from ..common.models.vitdet import cascade
from .student_s_100ep import dataloader, lr_multiplier, model, optimizer, train, vit

model = cascade(model)
train.output_dir = "output/vitdet/student_cascade_s_100ep"

"""dfd_b_s_100ep.py for one small GPU: 640 pixels for both, 16 parts a step, checkpointed blocks.

export DETECTRON2_DATASETS=...  # The folder that holds coco/.
python train_net.py --config-file configs/vitdet/dfd_b_s_640.py

The teacher was trained at 1024 pixels: see with --eval-teacher what it is worth at 640. Not run
here: needs COCO and a GPU; what it takes of its memory is not known.
"""

from .dfd_b_s_100ep import criteria, model
from .student_s_640 import dataloader, lr_multiplier, optimizer, train, vit
from .student_s_640 import model as _student

model.student = _student
train.output_dir = "output/vitdet/dfd_b_s_640"

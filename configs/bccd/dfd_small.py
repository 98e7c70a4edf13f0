"""The smallest BCCD student distilled, through a 1x1 adapter on every level.

python train_net.py --config-file configs/bccd/dfd_small.py dataloader.train.dataset.root=BCCD

Needs the teacher's checkpoint (configs/bccd/teacher.py). Hardware and length as the plain
student's.
"""

from .dfd import criteria, model
from .student_small import dataloader, lr_multiplier, optimizer, train
from .student_small import model as _student

model.student = _student
model.inherit = []
train.output_dir = "output/bccd/dfd_small"

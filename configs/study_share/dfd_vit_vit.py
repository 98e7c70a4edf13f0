"""The ViT student under a ViT teacher, DFD by its defaults: the other pair with that student.

python train_net.py --config-file configs/study_share/dfd_vit_vit.py \
    dataloader.train.dataset.root=BCCD

205 labelled images of the split train, settings chosen on val. Needs the teacher's checkpoint:
configs/bccd/teacher_vit.py with dataloader.train.dataset.split=train and this output folder.
Hardware: one CPU core, minutes. Result: docs/results.md.
"""

from ..bccd.dfd_vit import criteria, model
from .student_vit import dataloader, lr_multiplier, optimizer, train, vit

model.head.criterion.weight = 5.0  # DFD's default; that config's was chosen without a limit.
model.teacher.checkpoint = "output/study_share/teacher_vit/model_final.pth"
train.output_dir = "output/study_share/dfd_vit_vit"

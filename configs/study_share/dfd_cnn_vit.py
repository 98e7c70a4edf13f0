"""A ViT student under a CNN teacher, the pair in which DFD hurt: how strong may distillation be?

python train_net.py --config-file configs/study_share/dfd_cnn_vit.py \
    dataloader.train.dataset.root=BCCD

205 labelled images of the split train, settings chosen on val. Needs the teacher's checkpoint:
configs/bccd/teacher.py with dataloader.train.dataset.split=train and this output folder. Hardware:
one CPU core, minutes. Result: docs/results.md.
"""

from ..bccd.dfd_cnn_vit import criteria, model
from .student_vit import dataloader, lr_multiplier, optimizer, train, vit

model.head.criterion.weight = 5.0  # DFD's default.
model.head.criterion.leniency = 1.0  # Lenient throughout: the published numbers were made so.
model.teacher.checkpoint = "output/study_share/teacher_cnn/model_final.pth"
train.output_dir = "output/study_share/dfd_cnn_vit"

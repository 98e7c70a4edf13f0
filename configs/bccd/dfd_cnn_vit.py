"""The ViT student on BCCD under the CNN teacher: other kind of network, other channel order.

python train_net.py --config-file configs/bccd/dfd_cnn_vit.py dataloader.train.dataset.root=BCCD

Needs the teacher's checkpoint (configs/bccd/teacher.py). Hardware and length as the plain
student's. Result: docs/results.md.
"""

from .dfd_vit import criteria, dataloader, lr_multiplier, model, optimizer, train, vit
from .teacher import model as _teacher

model.teacher.update(model=_teacher, checkpoint="output/bccd/teacher/model_final.pth")
train.output_dir = "output/bccd/dfd_cnn_vit"

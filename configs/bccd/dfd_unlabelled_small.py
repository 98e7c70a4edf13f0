"""29 labelled images of BCCD, and the other photographs of its training split without labels.

python train_net.py --config-file configs/bccd/dfd_unlabelled_small.py \
    dataloader.train.dataset.root=BCCD

Each step has six labelled and six unlabelled images; these bring the distillation loss alone. Needs
the teacher's checkpoint (configs/bccd/teacher.py). Hardware: one CPU core, minutes. Result:
docs/results.md.
"""

from detectron2.config import LazyCall as L

from dfd.data import voc_folder

from .dfd_small import criteria, dataloader, lr_multiplier, model, optimizer, train

dataloader.train.dataset.num_images = 29
dataloader.train.unlabelled = L(voc_folder)(root="${..dataset.root}", split="${..dataset.split}")
dataloader.train.unlabelled_batch_size = 6
train.output_dir = "output/bccd/dfd_unlabelled_small"

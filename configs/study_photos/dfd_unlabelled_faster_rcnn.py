"""A tenth of the photographs with labels, the others without, Faster R-CNN under YOLOX-nano.

python train_net.py --config-file configs/study_photos/dfd_unlabelled_faster_rcnn.py \
    dataloader.train.dataset.json=train.json dataloader.train.dataset.images=images \
    dataloader.test.dataset.json=val.json dataloader.test.dataset.images=images

Each step has eight labelled and eight unlabelled images; these bring the distillation loss alone.
Weights as in dfd_faster_rcnn.py. Hardware: one CPU core, an hour. Status: docs/results.md.
"""

from detectron2.config import LazyCall as L

from dfd.data import coco_json

from .dfd_faster_rcnn import criteria, dataloader, lr_multiplier, model, optimizer, teachers, train

dataloader.train.dataset.num_images = 179
dataloader.train.unlabelled = L(coco_json)(
    json="${..dataset.json}", images="${..dataset.images}", classes="${..dataset.classes}"
)
dataloader.train.unlabelled_batch_size = 8
train.output_dir = "output/study_photos/dfd_unlabelled_faster_rcnn"

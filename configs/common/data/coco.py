"""COCO 2017 as Detectron2 registers it: set DETECTRON2_DATASETS to the folder that holds coco/.

Boxes only; Mask R-CNN needs dataloader.train.mapper.use_instance_mask=True.
"""

from .coco_json import dataloader

dataloader.train.dataset = "coco_2017_train"
dataloader.test.dataset = "coco_2017_val"

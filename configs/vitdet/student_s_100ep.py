"""The plain student: Mask R-CNN ViTDet-S on COCO, 100 epochs, from timm's weights.

export DETECTRON2_DATASETS=...  # The folder that holds coco/.
python train_net.py --config-file configs/vitdet/student_s_100ep.py --num-gpus 8

The weights are fetched on first use; model.backbone.net.pretrained=FILE takes them from a file.
Hardware: 8 GPUs, 184375 iterations of 64 images of 1024 pixels. Not run here: needs COCO and GPUs.
"""

from ..common.models.vitdet import timm_mask_rcnn_vitdet
from .base import dataloader, lr_multiplier, optimizer, train, vit

model = timm_mask_rcnn_vitdet(
    "vit_small_patch16_224.augreg_in21k", pretrained=True, drop_path_rate=0.1
)
train.output_dir = "output/vitdet/student_s_100ep"

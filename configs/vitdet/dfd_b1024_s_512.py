"""dfd_b_s_512.py with images in two sizes: the teacher sees 1024 pixels, the student 512.

export DETECTRON2_DATASETS=...  # The folder that holds coco/.
python train_net.py --config-file configs/vitdet/dfd_b1024_s_512.py

Levels whose cells cover the same part of the image make a pair: the student's p2 (4 of its pixels)
and the teacher's p3 (8 of its own), up to p5 and p6. With model.head.align=resize p2 pairs with p2,
resampled, which any two sizes allow: vit.img_size is the student's, vit.teacher_size the teacher's.
Not run here: needs COCO and a GPU.
"""

from detectron2.config import LazyCall as L

from dfd.data import TwoSizeMapper, size_ratio

from .dfd_b_s_512 import criteria, dataloader, lr_multiplier, model, optimizer, train, vit

vit.teacher_size = 1024

_scale = L(size_ratio)(teacher="${vit.teacher_size}", student="${vit.img_size}")
_size = "${vit.teacher_size}"
_resize, _crop = dataloader.train.mapper.augmentations[1:]
_resize.update(target_height=_size, target_width=_size)
_crop.crop_size = [_size, _size]
dataloader.test.mapper.augmentations[0].update(short_edge_length=_size, max_size=_size)
for _split in ("train", "test"):
    dataloader[_split].mapper.update(_target_=TwoSizeMapper, teacher_scale=_scale)
model.teacher.scale = _scale
model.teacher.model.backbone.square_pad = _size
train.output_dir = "output/vitdet/dfd_b1024_s_512"

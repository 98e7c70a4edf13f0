"""RepPoints R50-GN under X101-32x4d-DCN by PKD, as published: dfd_x101_dcn_r50_2x.py but for it.

python train_net.py --config-file configs/reppoints/pkd_x101_dcn_r50_2x.py --num-gpus 8 \
    model.teacher.checkpoint=path/to/reppoints_moment_x101_fpn_dconv_c3-c5_gn-neck+head_2x_coco.pth

Weight 10 on each of p3 to p6; nothing of the teacher's is inherited. Its authors reached 42.3 AP
(38.6 without). For FGD and MGD: model.head.criterion='${criteria.fgd}' of the config of DFD.

Hardware: 8 GPUs, 24 epochs of 16 images. Not run here: needs COCO and GPUs.
"""

from .dfd_x101_dcn_r50_2x import criteria, dataloader, lr_multiplier, model, optimizer, train

model.head.criterion = "${criteria.pkd}"
model.head.levels = ["p3", "p4", "p5", "p6"]
model.head.level_weights = "equal"
model.inherit = []
train.output_dir = "output/reppoints/pkd_x101_dcn_r50_2x"

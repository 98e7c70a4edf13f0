"""student_s_100ep.py for one small GPU: 512 pixels, 8 parts a step, checkpointed blocks.

export DETECTRON2_DATASETS=...  # The folder that holds coco/.
python train_net.py --config-file configs/vitdet/student_s_512.py

Steps are those of the recipe, 64 images, worked through 8 at a time. train.epochs=25 makes a
shorter run. Not run here: needs COCO and a GPU; what it takes of its memory is not known.
"""

from .student_s_100ep import dataloader, lr_multiplier, model, optimizer, train, vit

vit.img_size = 512
model.backbone.net.act_checkpoint = True
train.accumulation_steps = 8
train.output_dir = "output/vitdet/student_s_512"

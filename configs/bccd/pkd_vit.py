"""The ViT student on BCCD under the ViT teacher by PKD: dfd_vit.py with another criterion.

python train_net.py --config-file configs/bccd/pkd_vit.py dataloader.train.dataset.root=BCCD
"""

from .dfd_vit import criteria, dataloader, lr_multiplier, model, optimizer, train, vit

model.head.criterion = "${criteria.pkd}"
train.output_dir = "output/bccd/pkd_vit"

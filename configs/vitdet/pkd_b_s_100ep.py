"""dfd_b_s_100ep.py with PKD in the place of DFD, at its published weight. Not run here."""

from .dfd_b_s_100ep import criteria, dataloader, lr_multiplier, model, optimizer, train, vit

model.head.criterion = "${criteria.pkd}"
train.output_dir = "output/vitdet/pkd_b_s_100ep"

"""Optimizers; ``params.model`` is set when the model is built."""

import torch
from detectron2.config import LazyCall as L

from dfd.optim import parameter_groups

SGD = L(torch.optim.SGD)(
    params=L(parameter_groups)(
        base_lr="${..lr}", weight_decay="${..weight_decay}", weight_decay_norm=0.0
    ),
    lr=0.02,
    momentum=0.9,
    weight_decay=1e-4,
)

# YOLOX's: only the weights of convolutions and linear layers decay. lr is that of 64 images a step,
# and proportional to their number.
NesterovSGD = L(torch.optim.SGD)(
    params=L(parameter_groups)(
        base_lr="${..lr}",
        weight_decay="${..weight_decay}",
        weight_decay_norm=0.0,
        weight_decay_bias=0.0,
    ),
    lr=0.01,
    momentum=0.9,
    nesterov=True,
    weight_decay=5e-4,
)

AdamW = L(torch.optim.AdamW)(
    params=L(parameter_groups)(
        base_lr="${..lr}", weight_decay="${..weight_decay}", weight_decay_norm=0.0
    ),
    lr=5e-4,
    betas=(0.9, 0.999),
    weight_decay=0.05,
)

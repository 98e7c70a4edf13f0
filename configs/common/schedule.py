"""Learning rate schedules that follow ``train.max_iter``, whatever it is set to."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler

from dfd.schedule import QuadraticWarmupCosine

# The warm-up is a share of the run.
cosine = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_length=0.05,
    warmup_method="linear",
    warmup_factor=0.01,
)

# Detectron2's "2x" of 180000 iterations with its warm-up of 1000. Only the proportions count: steps
# and warm-up shrink with the run.
coco_2x = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[120000, 160000, 180000]
    ),
    warmup_length=1000 / 180000,
    warmup_method="linear",
    warmup_factor=0.001,
)

# RepPoints' of 24 epochs: dropped after 16 and 22, with a warm-up of 500 iterations from a third.
reppoints_2x = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=[16, 22, 24]),
    warmup_length=500 / 175920,
    warmup_method="linear",
    warmup_factor=1 / 3,
)

# YOLOX's of 300 epochs: 5 of warm-up, the last 15 at a constant rate. The same share of the run is
# without mosaic in data/mosaic.py.
yolox = L(QuadraticWarmupCosine)(warmup=5 / 300, closing=15 / 300, end_value=0.05)

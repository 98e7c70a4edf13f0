"""Learning rate schedules that follow ``train.max_iter``, whatever it is set to."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

# The warm-up is a share of the run.
cosine = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_length=0.05,
    warmup_method="linear",
    warmup_factor=0.01,
)

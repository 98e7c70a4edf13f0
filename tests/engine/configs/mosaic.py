"""A dense student on YOLOX's data, schedule, optimizer and EMA, all of which a short run sees."""

from toys import dense_config

from ....configs.common.data.mosaic import use_mosaic
from ....configs.common.optim import NesterovSGD as optimizer
from ....configs.common.schedule import yolox as lr_multiplier
from .student import dataloader, train

model = dense_config("retinanet")
model.num_classes = "auto"
use_mosaic(dataloader, size=64, sizes=(32, 64, 96))
dataloader.train.mapper.size_period.iterations = 2
dataloader.train.mapper.off_from_batch.closing = 0.25
lr_multiplier.closing = 0.25
train.ema.decay = 0.9
train.ema.warmup = 3

from detectron2.config import LazyCall as L
from plain import FailingMapper, PlainDetector

from dfd import DFDHead, DistilledDetector, FrozenTeacher
from dfd.losses import DFDLoss

from ....configs.common.optim import SGD as optimizer
from .student import dataloader, lr_multiplier, train
from .teacher import model as _teacher

model = L(DistilledDetector)(
    student=L(PlainDetector)(num_classes="auto", channels=6),
    teacher=L(FrozenTeacher)(model=_teacher, allow_random=True),
    head=L(DFDHead)(criterion=L(DFDLoss)(average="all", sync_statistics=True)),
)
dataloader.train.mapper._target_ = FailingMapper
dataloader.train.total_batch_size = 4
dataloader.evaluator.output_dir = "${train.output_dir}"

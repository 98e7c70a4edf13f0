"""One step of a small distilled detector, taken apart."""

import torch
from toys import build, make_batch

from dfd import DFDHead, DistilledDetector, FrozenTeacher
from dfd.engine.trainer import Trainer
from dfd.losses import DFDLoss


def distilled(student, **criterion):
    teacher = FrozenTeacher(model=build(seed=1), allow_random=True, precision="fp32")
    head = DFDHead(criterion=DFDLoss(**criterion), adapter="conv1x1")
    return DistilledDetector(student=student, teacher=teacher, head=head)


def images(*seeds, size=(64, 64)):
    """A batch with an image of each seed."""
    return [item for seed in seeds for item in make_batch([size], seed=seed)]


def gradients(model, batches, **kwargs):
    """Name to gradient of one step over these batches; and the trainer."""
    model.zero_grad(set_to_none=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = Trainer(
        model, batches, optimizer, device="cpu", accumulation_steps=len(batches), **kwargs
    )
    trainer.train(0, 1)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, trainer


def scalars(trainer):
    return {name: value for name, (value, _) in trainer.storage.latest().items()}

"""Accumulation: a step of several batches is a step of one that holds them all."""

import pytest
import torch
from detectron2.config import instantiate
from detectron2.utils.events import get_event_storage
from omegaconf import OmegaConf
from steps import distilled, gradients, images, scalars
from torch import nn
from toys import build, faster_rcnn_config

from dfd import UserError
from dfd.engine.build import micro_batches
from dfd.engine.trainer import Trainer


def detector_without_chance(norm="FrozenBN"):
    """Faster R-CNN whose losses are means over images: nothing is drawn, as much of each image."""
    config = faster_rcnn_config(norm=norm)
    proposals, heads = config.proposal_generator, config.roi_heads
    # All anchors and all proposals, of which each image has the same number.
    proposals.batch_size_per_image, proposals.positive_fraction = 10**6, 1.0
    proposals.nms_thresh = 1.0
    heads.batch_size_per_image, heads.positive_fraction = 10**6, 1.0
    torch.manual_seed(0)
    return instantiate(config)


def make_model(norm="FrozenBN", **criterion):
    model = distilled(detector_without_chance(norm), split="quantile", **criterion)
    # Features of about 1, so that neither loss drowns the other.
    model.student.pixel_std.fill_(100.0)
    model.teacher.model.pixel_std.fill_(100.0)
    model.head.weight = 0.01
    model.head.gradient_share = None  # Whose factor is that of the part.
    return model


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_gives_the_gradient_of_the_larger_batch(parts):
    """A whole distilled Faster R-CNN, where only means over the batch depend on it."""
    model = make_model(scale="none", lenient="context")
    batch = images(0, 1, 2, 3)
    whole, one = gradients(model, [batch])
    size = len(batch) // parts
    summed, many = gradients(model, [batch[i : i + size] for i in range(0, len(batch), size)])
    assert len(whole) > 60 and set(summed) == set(whole)
    for name, gradient in whole.items():
        assert (summed[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    assert 0.5 < scalars(one)["dfd/ratio"] < 10  # Both losses count.
    # And so are the metrics, but for time, memory and ratios, whose mean is not that of the parts.
    expected = scalars(one)
    for name, value in scalars(many).items():
        if not any(word in name for word in ("time", "memory", "ratio")):
            assert value == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    ("norm", "criterion"), [("BN", {"scale": "none"}), ("FrozenBN", {"scale": "channel"})]
)
def test_accumulation_differs_where_the_batch_is_standardised(norm, criterion):
    """What docs/running.md excepts: batch norms, and criteria that standardise over the batch."""
    model = make_model(norm, **criterion)
    whole, _ = gradients(model, [images(0, 1, 2, 3)])
    summed, _ = gradients(model, [images(0, 1), images(2, 3)])
    difference = sum((summed[n] - g).square().sum() for n, g in whole.items()).sqrt()
    norm = sum(g.square().sum() for g in whole.values()).sqrt()
    assert difference > 1e-3 * norm


class Logging(nn.Module):
    """Logs its input and the iteration, as detectors and the head do; its loss is its input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        storage = get_event_storage()
        storage.put_scalar("input", x)
        storage.put_scalar("iteration", storage.iter, smoothing_hint=False)
        storage.put_image("picture", torch.zeros(3, 4, 4))
        return {"loss": self.weight * x}


def test_metrics_are_means_over_the_step_and_the_schedule_counts_steps():
    model = Logging()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    data = [1.0, 2.0, 6.0, 4.0, 5.0, 9.0]
    trainer = Trainer(model, data, optimizer, device="cpu", accumulation_steps=3)
    trainer.train(0, 2)
    histories = trainer.storage.histories()
    for name in ("input", "total_loss"):
        assert histories[name].values() == [(3.0, 0), (6.0, 1)]
    assert histories["iteration"].values() == [(0, 0), (1, 1)]
    assert trainer.storage.smoothing_hints()["iteration"] is False
    assert len(trainer.storage._vis_data) == 6


def test_distillation_warms_up_by_steps():
    model = distilled(build())
    model.head.warmup_iters = 4
    seen = []
    factor = model.head.factor
    model.head.factor = lambda iteration: seen.append(iteration) or factor(iteration)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    data = [images(0)] * 4
    Trainer(model, data, optimizer, device="cpu", accumulation_steps=2).train(0, 2)
    assert sorted(set(seen)) == [0, 1]


def test_accumulation_that_does_not_divide_the_batch_is_refused():
    cfg = OmegaConf.create(
        {"dataloader": {"train": {"total_batch_size": 8}}, "train": {"accumulation_steps": 3}}
    )
    with pytest.raises(UserError, match="accumulation_steps=3 does not divide"):
        micro_batches(cfg)


def test_accumulation_shares_out_the_batch():
    cfg = OmegaConf.create(
        {"dataloader": {"train": {"total_batch_size": 8}}, "train": {"accumulation_steps": 4}}
    )
    assert micro_batches(cfg).total_batch_size == 2
    assert cfg.dataloader.train.total_batch_size == 8

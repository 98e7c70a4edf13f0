"""The learning rate of YOLOX, against its own formula."""

import math

import pytest
from detectron2.config import LazyConfig, instantiate

from dfd import UserError
from dfd.engine.schedule import QuadraticWarmupCosine


@pytest.mark.parametrize("per_epoch", [1, 7])
def test_rate_is_the_official_one_at_any_length(per_epoch):
    """300 epochs: 5 of warm-up, the last 15 at the lowest rate."""
    schedule = instantiate(LazyConfig.load("configs/common/schedule.py").yolox)
    total, warmup, closing = (epochs * per_epoch for epochs in (300, 5, 15))
    for i in range(total):
        if i <= warmup:
            expected = (i / warmup) ** 2
        elif i >= total - closing:
            expected = 0.05
        else:
            part = (i - warmup) / (total - warmup - closing)
            expected = 0.05 + 0.5 * 0.95 * (1 + math.cos(math.pi * part))
        assert schedule(i / total) == pytest.approx(expected, abs=1e-9), i


def test_warmup_and_closing_part_may_be_left_out():
    schedule = QuadraticWarmupCosine(warmup=0, closing=0, end_value=0.1)
    assert schedule(0) == 1 and schedule(0.5) == pytest.approx(0.55)
    assert schedule(1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "settings", [dict(warmup=-0.1), dict(closing=1), dict(warmup=0.6, closing=0.5),
                 dict(end_value=2), dict(warmup=float("nan"))],
)  # fmt: skip
def test_share_outside_the_run_is_one_line(settings):
    with pytest.raises(UserError, match=r"QuadraticWarmupCosine\(.*needs shares"):
        QuadraticWarmupCosine(**settings)

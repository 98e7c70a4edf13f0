"""What of the hooks' settings can be told wrong before anything is built."""

from __future__ import annotations

from omegaconf import DictConfig

from ...errors import UserError
from ...ranges import is_integer, is_number
from ..wandb_writer import import_wandb
from .load import HOOK_DEFAULTS


def check_hooks(cfg: DictConfig) -> None:
    """Check ``train.best_checkpoint``, ``early_stop``, ``ema``, ``val_loss`` and ``wandb``.

    Raises:
        UserError: a value is out of range, a key unknown, a metric can never be there, or wandb is
            asked for and not installed.
    """
    train = cfg.train
    for name, keys in HOOK_DEFAULTS.items():
        node = train[name]
        unknown = sorted(set(node) - set(keys)) if isinstance(node, DictConfig) else [str(node)]
        if unknown:
            raise UserError(f"train.{name} has no {unknown[0]!r}: it has {', '.join(keys)}")
    decay, val_loss = train.ema.decay, train.val_loss
    if decay is not None and not (is_number(decay) and 0 < decay < 1):
        raise UserError(f"train.ema.decay is {decay}: it must be above 0 and below 1, or null")
    warmup = train.ema.warmup
    if warmup is not None and not (is_number(warmup) and 0 < warmup):
        raise UserError(f"train.ema.warmup is {warmup}: it must be a number above 0, or null")
    if not is_integer(val_loss.period) or val_loss.period < 0:
        raise UserError(f"train.val_loss.period is {val_loss.period}: it must be 0 (never) or more")
    if val_loss.num_images is not None and not (
        is_integer(val_loss.num_images) and val_loss.num_images >= 1
    ):
        raise UserError(
            f"train.val_loss.num_images is {val_loss.num_images}: it must be 1 or more, or null"
        )
    _check_metric(cfg, "best_checkpoint")
    _check_metric(cfg, "early_stop")
    _check_early_stop(train.early_stop)
    if train.wandb.project is not None:
        import_wandb()


def metric_period(cfg: DictConfig, metric: str) -> int:
    """How often what computes a metric runs, in iterations; 0: never, or at the end only."""
    of_val_loss = metric == "val_loss" or metric.startswith("val/")
    return cfg.train.val_loss.period if of_val_loss else cfg.train.eval_period


def _check_metric(cfg: DictConfig, name: str) -> None:
    train, node = cfg.train, cfg.train[name]
    metric = node.metric
    if node.mode not in ("max", "min"):
        raise UserError(f"train.{name}.mode is {node.mode!r}: it must be max or min")
    if metric is None:
        return
    if not isinstance(metric, str) or not metric:
        raise UserError(f"train.{name}.metric is {metric!r}: it must be a name such as bbox/AP")
    if metric_period(cfg, metric) <= 0:
        of_val_loss = metric == "val_loss" or metric.startswith("val/")
        key = "val_loss.period" if of_val_loss else "eval_period"
        raise UserError(
            f"train.{name}.metric is {metric}, but train.{key} is 0, so that it is not computed "
            f"on the way: set train.{key}"
        )
    if metric.startswith("ema/") and train.ema.decay is None:
        raise UserError(
            f"train.{name}.metric is {metric}, but there is no EMA: set train.ema.decay"
        )


def _check_early_stop(node: DictConfig) -> None:
    if (node.metric is None) != (node.patience is None):
        given, missing = ("metric", "patience") if node.patience is None else ("patience", "metric")
        raise UserError(f"train.early_stop has a {given} but no {missing}: set both or neither")
    if node.patience is not None and not (is_integer(node.patience) and node.patience >= 1):
        raise UserError(
            f"train.early_stop.patience is {node.patience}: it must be 1 evaluation or more"
        )
    if not is_number(node.min_delta) or not node.min_delta >= 0:
        raise UserError(f"train.early_stop.min_delta is {node.min_delta}: it must be 0 or more")

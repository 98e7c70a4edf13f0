"""The settings of ``train`` that are this project's, each with its type, default and range.

A dataclass is the schema of a section. Detectron2's own keys of ``train`` stand beside them, and a
user's may. Values stay as they are written: nothing is converted, a wrong one is refused in a line.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ...errors import UserError, first_line
from ..wandb_writer import import_wandb


@dataclass(frozen=True)
class _Rule:
    """What a setting may be: of a type, in a range, and the two in words."""

    type: Any
    demand: str
    holds: Callable[[Any], bool] = lambda value: True

    @property
    def types(self) -> tuple[type, ...]:
        return typing.get_args(self.type) or (self.type,)

    def permits(self, value: Any) -> bool:
        if value is None:
            return types.NoneType in self.types
        return any(_is(value, kind) for kind in self.types) and self.holds(value)


def _is(value: Any, kind: type) -> bool:
    if kind in (int, float):  # A bool is an int to Python, and an int will do for a float.
        numbers = int if kind is int else int | float
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, kind)


def _setting(default: Any, demand: str, holds: Callable[[Any], bool] = lambda value: True) -> Any:
    return field(default=default, metadata={"demand": demand, "holds": holds})


def _text_or_null() -> Any:
    return _setting(None, "it must be text, or null", bool)


def _metric() -> Any:
    return _setting(None, "it must be a name such as bbox/AP, or null", bool)


def _mode() -> Any:
    return _setting("max", "it must be max or min", lambda mode: mode in ("max", "min"))


def _period() -> Any:
    return _setting(0, "it must be 0 (never) or more", lambda period: period >= 0)


@dataclass
class DisparityImages:
    """Pictures of the disparity on the first test images, in TensorBoard and ``disparity/``."""

    period: int = _period()  # In iterations.
    num_images: int = _setting(0, "it must be 0 (none) or more", lambda count: count >= 0)


@dataclass
class BestCheckpoint:
    """``model_best.pth``: the student at the best value of a metric, such as bbox/AP."""

    metric: str | None = _metric()
    mode: str = _mode()  # Which of two values is better.


@dataclass
class EarlyStop:
    """Ends the run when a metric has not been better for some evaluations."""

    metric: str | None = _metric()
    mode: str = _mode()
    # In evaluations.
    patience: int | None = _setting(None, "it must be 1 evaluation or more", lambda n: n >= 1)
    # A value has to be better by more than this.
    min_delta: float = _setting(0.0, "it must be 0 or more", lambda d: 0 <= d < math.inf)


@dataclass
class EMA:
    """An average of the student, which is evaluated and saved (``model_ema.pth``)."""

    # The share of the average that an update keeps.
    decay: float | None = _setting(
        None, "it must be above 0 and below 1, or null", lambda decay: 0 < decay < 1
    )
    # In updates, over which the decay grows to its value.
    warmup: float | None = _setting(
        None, "it must be a number above 0, or null", lambda updates: 0 < updates < math.inf
    )


@dataclass
class ValidationLoss:
    """The student's own loss on the test data."""

    period: int = _period()  # In iterations.
    # The first so many images that have objects; null: all.
    num_images: int | None = _setting(None, "it must be 1 or more, or null", lambda n: n >= 1)


@dataclass
class Wandb:
    """Metrics sent to Weights & Biases too, where there is a project; as of ``wandb.init``."""

    project: str | None = _text_or_null()
    entity: str | None = _text_or_null()
    name: str | None = _text_or_null()
    mode: str | None = _text_or_null()


# numpy's generators take 32 bits, and each process adds its rank.
_LAST_SEED = 2**32 - 2**16


@dataclass
class Train:
    """The settings of ``train`` that Detectron2 does not have."""

    # For weights, sampling and data. As in Detectron2, a negative one means another each time.
    seed: int = _setting(
        -1, f"it must be an integer of at most {_LAST_SEED}", lambda seed: seed <= _LAST_SEED
    )
    # Passes over the training data; they win over max_iter.
    epochs: float | None = _setting(
        None, "it must be a number above 0, or null", lambda n: 0 < n < math.inf
    )
    # The parts in which a step's batch is worked through.
    accumulation_steps: int = _setting(
        1, "it must be an integer of at least 1", lambda steps: steps >= 1
    )
    # The largest norm of the gradient over all parameters.
    clip_grad_norm: float | None = _setting(
        None, "it must be above 0 or null", lambda norm: norm > 0
    )
    # Whether the teacher is evaluated on the test data before iteration 0.
    eval_teacher_first: bool = _setting(False, "it must be True or False")
    # A teacher whose box AP is lower stops the run before iteration 0.
    min_teacher_ap: float | None = _setting(
        None, "it is in percent, from 1 to 100, or null", lambda ap: 1 <= ap <= 100
    )
    disparity_images: DisparityImages = field(default_factory=DisparityImages)
    best_checkpoint: BestCheckpoint = field(default_factory=BestCheckpoint)
    early_stop: EarlyStop = field(default_factory=EarlyStop)
    ema: EMA = field(default_factory=EMA)
    val_loss: ValidationLoss = field(default_factory=ValidationLoss)
    wandb: Wandb = field(default_factory=Wandb)
    # Calls, L(MyHook)(...), of Detectron2's HookBase: a user's own hooks.
    hooks: list[Any] = field(default_factory=list)


# As plain containers.
TRAIN_DEFAULTS: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(Train))


def _rules(schema: type, prefix: str) -> Iterator[tuple[str, _Rule]]:
    hints = typing.get_type_hints(schema)
    for part in fields(schema):
        key = f"{prefix}.{part.name}"
        if is_dataclass(hints[part.name]):
            yield from _rules(hints[part.name], key)
        elif part.metadata:
            yield key, _Rule(hints[part.name], **part.metadata)


def _at_least(least: int) -> _Rule:
    return _Rule(int, f"it must be an integer of at least {least}", lambda value: value >= least)


_SECTIONS = {
    name: list(default) for name, default in TRAIN_DEFAULTS.items() if isinstance(default, dict)
}
_OURS = dict(_rules(Train, "train"))
# Sections of Detectron2's that this project reads whole; a config may lack them.
_READ_WHOLE = {"amp": ["enabled", "dtype"], "checkpointer": ["period", "max_to_keep"]}
# What else of Detectron2's there is in ``train`` beside the keys below.
_PLAIN = ("init_checkpoint", "device", "ddp", "cudnn_benchmark")
_DETECTRON2 = {
    "train.output_dir": _Rule(str, "it must be a folder", bool),
    "train.max_iter": _at_least(1),
    "train.amp.enabled": _Rule(
        bool | str, "it must be True, False or auto", lambda v: isinstance(v, bool) or v == "auto"
    ),
    "train.eval_period": _at_least(0),
    "train.log_period": _at_least(1),
    "train.checkpointer.period": _at_least(1),
    "train.checkpointer.max_to_keep": _Rule(
        int | None, "it must be an integer of at least 1, or null for all", lambda n: n >= 1
    ),
    "dataloader.train.total_batch_size": _at_least(1),
}
# Sections of Detectron2's, and the parts of a config, none of which can be null or a plain value.
_PARTS = (
    *(f"train.{name}" for name in ("amp", "checkpointer", "ddp")),
    *("model", "model.student", "model.teacher", "model.teacher.model", "model.head"),
    *("model.backbone", "model.student.backbone", "model.teacher.model.backbone"),
    *("optimizer", "optimizer.params", "lr_multiplier", "dataloader"),
    *(f"dataloader.{split}{part}" for split in ("train", "test") for part in ("", ".mapper")),
)
# What takes text, and whether it may be null.
TEXT_OF_A_RUN = {
    "train.output_dir": False,
    "train.init_checkpoint": True,
    "train.device": False,
    "train.amp.dtype": False,
    **{key: rule.permits(None) for key, rule in _OURS.items() if str in rule.types},
}


def add_defaults(cfg: DictConfig) -> None:
    """Give ``train`` the settings of the schema that it does not have, in place."""
    defaults = OmegaConf.create(TRAIN_DEFAULTS, flags={"allow_objects": True})
    cfg.train = OmegaConf.merge(defaults, cfg.train)


def check_settings(cfg: DictConfig) -> None:
    """
    Raises:
        UserError: a setting is of the wrong kind or outside its range, or refers to nothing; or a
            section of this project's has one that is not known.
    """
    for name, known in {**_SECTIONS, **_READ_WHOLE}.items():
        node = _value(cfg, f"train.{name}")
        if name in _READ_WHOLE and not isinstance(node, DictConfig):
            continue  # Told below.
        unknown = sorted(set(node) - set(known)) if isinstance(node, DictConfig) else [str(node)]
        if unknown:
            raise UserError(f"train.{name} has no {unknown[0]!r}: it has {', '.join(known)}")
    _check_spelling(cfg.train)
    for key in _PARTS:
        value = _value(cfg, key)
        if value is None or isinstance(value, bool | int | float | str):
            raise UserError(f"{key} is {value!r}; it must be a section or a call, L(...)(...)")
    for key, rule in {**_DETECTRON2, **_OURS}.items():
        value = _value(cfg, key)
        if value is _ABSENT or rule.permits(value):
            continue
        if key in _OURS and key.count(".") > 1:
            shown = repr(value) if str in rule.types else str(value)
            raise UserError(f"{key} is {shown}: {rule.demand}")
        raise UserError(f"{key} is {value!r}; {rule.demand}")
    _check_user_hooks(_value(cfg, "train.hooks"))


def _check_spelling(train: DictConfig) -> None:
    """A user's own keys may stand in ``train``, but not one that looks like one of ours."""
    keys = [key.split(".")[1] for key in _DETECTRON2 if key.startswith("train.")]
    known = {*TRAIN_DEFAULTS, *_READ_WHOLE, *_PLAIN, *keys}
    for key in sorted(set(map(str, train)) - known):
        meant = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if meant:
            raise UserError(
                f"train has no {key!r}, and nothing would read it: write {meant[0]!r}, or give a "
                "setting of your own another name"
            )


_ABSENT = object()


def _value(cfg: DictConfig, key: str) -> Any:
    try:
        return OmegaConf.select(cfg, key, default=_ABSENT)
    except OmegaConfBaseException as error:
        raise UserError(f"{key} cannot be resolved: {first_line(error)}") from error


def _check_user_hooks(hooks: Any) -> None:
    if not isinstance(hooks, ListConfig):
        raise UserError(f"train.hooks is {hooks!r}; it must be a list of calls, [L(MyHook)(...)]")
    for i, hook in enumerate(hooks):
        if not isinstance(hook, DictConfig) or "_target_" not in hook:
            raise UserError(
                f"train.hooks.{i} is {hook!r}; it must be a call, L(MyHook)(...) or, on the "
                "command line, {_target_: package.MyHook, ...}"
            )


def check_training(cfg: DictConfig) -> None:
    """What settings that are right by themselves must not be together, where a run is trained.

    Raises:
        UserError: a metric can never be there, half of an early stop or of an EMA is set, the
            warm-up is no share of the run, or wandb is asked for and not installed.
    """
    train = cfg.train
    _check_metric(cfg, "best_checkpoint")
    _check_metric(cfg, "early_stop")
    metric, patience = train.early_stop.metric, train.early_stop.patience
    if (metric is None) != (patience is None):
        given, missing = ("metric", "patience") if patience is None else ("patience", "metric")
        raise UserError(f"train.early_stop has a {given} but no {missing}: set both or neither")
    if metric is None and train.early_stop.min_delta:
        raise UserError("train.early_stop has a min_delta but no metric and patience: set them")
    if train.ema.warmup is not None and train.ema.decay is None:
        raise UserError("train.ema has a warmup but no decay: set train.ema.decay")
    if train.wandb.project is not None:
        import_wandb()
    _check_warmup(cfg)


def _check_warmup(cfg: DictConfig) -> None:
    """Detectron2's schedule takes a share of the run, and believes any number."""
    length = OmegaConf.select(cfg, "lr_multiplier.warmup_length")
    if isinstance(length, int | float) and not 0 <= length < 1:
        raise UserError(
            f"lr_multiplier.warmup_length is {length}; it is a share of the run, from 0 to below 1:"
            " for a number of iterations, divide it by train.max_iter"
        )


def _check_metric(cfg: DictConfig, name: str) -> None:
    metric = cfg.train[name].metric
    if metric is None:
        return
    if metric_period(cfg, metric) <= 0:
        key = _period_key(metric)
        raise UserError(
            f"train.{name}.metric is {metric}, but train.{key} is 0, so that it is not computed "
            f"on the way: set train.{key}"
        )
    if metric.startswith("ema/") and cfg.train.ema.decay is None:
        raise UserError(
            f"train.{name}.metric is {metric}, but there is no EMA: set train.ema.decay"
        )
    if _of_val_loss(metric) and cfg.train[name].mode == "max":
        raise UserError(
            f"train.{name}.metric is {metric}, a loss, and train.{name}.mode is max, so that the "
            f"worst would count as the best: set train.{name}.mode=min"
        )


def metric_period(cfg: DictConfig, metric: str) -> int:
    """How often what computes a metric runs, in iterations; 0: never, or at the end only."""
    return OmegaConf.select(cfg.train, _period_key(metric))


def _period_key(metric: str) -> str:
    return "val_loss.period" if _of_val_loss(metric) else "eval_period"


def _of_val_loss(metric: str) -> bool:
    return metric == "val_loss" or metric.startswith("val/")

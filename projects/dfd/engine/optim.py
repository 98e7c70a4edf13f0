"""Groups of the optimizer, by the student's own parameter names.

A distilled student's parameters are called ``student.backbone...`` in the model that is trained. A
rule about names that met them so would match nothing, without an error, and layer decay would be
lost. Here every rule sees the names that a bare student has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from tabulate import tabulate
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..distill.detector import DistilledDetector
from ..errors import UserError
from ..ranges import check_number

# A number in the path to "blocks" counts stages (Swin, ConvNeXt), in which a block has no depth.
_TRUNK = r"backbone\.(?:[a-z_]+\.)*"
_BLOCK = re.compile(_TRUNK + r"blocks\.(\d+)\.")
_STEM = re.compile(
    _TRUNK + r"(?:pos_embed|patch_embed|cls_token|reg_token|dist_token|mask_token|norm_pre)(?:\.|$)"
)
_OVERRIDES = {"lr_multiplier", "weight_decay"}
_EXAMPLES = 2


def parameter_groups(
    *,
    model: nn.Module,
    base_lr: float,
    weight_decay: float,
    weight_decay_norm: float = 0.0,
    weight_decay_bias: float | None = None,
    weight_decay_1d: float | None = None,
    weight_decay_pos_embed: float | None = None,
    lr_decay: float | None = None,
    num_layers: int | None = None,
    head_lr_multiplier: float = 1.0,
    head_weight_decay: float | None = None,
    overrides: Mapping[str, Mapping[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """All trainable parameters, those of like rate and decay together: an optimizer's ``params``.

    Where several settings of weight decay fit a parameter, the first in this order counts:
    ``overrides``, ``weight_decay_norm``, ``weight_decay_bias``, ``weight_decay_1d``,
    ``weight_decay_pos_embed``, ``weight_decay``.

    Args:
        model: a detector, or a DistilledDetector, also in DistributedDataParallel. The head of the
            latter (adapters, criteria) gets groups of its own, named ``distillation/...``.
        base_lr, weight_decay: of every parameter that nothing below changes.
        weight_decay_norm: of the parameters of normalisation layers, see :func:`is_norm`.
        weight_decay_bias: of parameters named ``bias``; None: no rule.
        weight_decay_1d: of every vector and scalar (biases, LayerScale); None: no rule. 0 is usual
            for ViTs.
        weight_decay_pos_embed: of position embeddings, parameters named ``pos_embed``, if there
            are any; None: no rule. 0 in ViTDet.
        lr_decay: in (0, 1]: the rate of a ViT's layer is that of the next one times this, see
            :func:`depth_of`. None: off.
        num_layers: blocks of the ViT; None: counted.
        head_lr_multiplier: of the distillation head's rate, against ``base_lr``.
        head_weight_decay: takes the place of ``weight_decay`` in the distillation head; None: the
            same.
        overrides: pattern (``*pos_embed``, ``backbone.*``; of fnmatch, over the whole name, case
            matters) to ``lr_multiplier``, ``weight_decay`` or both. Of the detector only. A later
            pattern wins.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay``, ``name`` and ``param_names``, those of the
        detector first and by depth, then in the order of the model's parameters, so that a resumed
        optimizer finds its own. The names in ``param_names`` are the detector's own, and
        ``head....`` in the groups of the distillation head.

    Raises:
        UserError: an override matches no parameter or has another key; ``lr_decay`` is outside
            (0, 1], or the detector has no ViT trunk, or not ``num_layers`` blocks.
    """
    numbers = {
        "base_lr": base_lr,
        "weight_decay": weight_decay,
        "weight_decay_norm": weight_decay_norm,
        "weight_decay_bias": weight_decay_bias,
        "weight_decay_1d": weight_decay_1d,
        "weight_decay_pos_embed": weight_decay_pos_embed,
        "head_weight_decay": head_weight_decay,
        "head_lr_multiplier": head_lr_multiplier,
    }
    for key, value in numbers.items():
        if value is not None:
            check_number(f"optimizer.params.{key}", value)
    detector, head = split_model(model)
    names = [name for name, _ in detector.named_parameters()]
    overrides = _check_overrides(overrides or {}, names)
    lr_decay = None if lr_decay == 1 else lr_decay
    layers = 0 if lr_decay is None else _count_layers(lr_decay, num_layers, names)
    groups: dict[tuple, dict[str, Any]] = {}

    def decay_of(name: str, module: nn.Module, parameter: nn.Parameter, default: float) -> float:
        if is_norm(module, parameter):
            return weight_decay_norm
        if weight_decay_bias is not None and name.rpartition(".")[2] == "bias":
            return weight_decay_bias
        if weight_decay_1d is not None and parameter.ndim <= 1:
            return weight_decay_1d
        if weight_decay_pos_embed is not None and name.rpartition(".")[2] == "pos_embed":
            return weight_decay_pos_embed
        return default

    def add(part: str, layer: int | None, scale: float, decay: float, default: float) -> dict:
        rate = 1.0 if layer is None else lr_decay ** (layers + 1 - layer)
        new = {
            "params": [],
            "param_names": [],
            "name": _group_name(part, layer, scale, decay, default),
            "lr": base_lr * scale * rate,
            "weight_decay": decay,
        }
        return groups.setdefault((part, layer, scale, decay), new)

    for name, module, parameter in _trainable(detector):
        layer = None if lr_decay is None else depth_of(name, layers)
        layer = None if layer == layers + 1 else layer
        own = {"lr_multiplier": 1.0}
        own["weight_decay"] = decay_of(name, module, parameter, weight_decay)
        for pattern, values in overrides.items():
            own.update(values if fnmatchcase(name, pattern) else {})
        group = add("detector", layer, own["lr_multiplier"], own["weight_decay"], weight_decay)
        group["params"].append(parameter)
        group["param_names"].append(name)
    default = weight_decay if head_weight_decay is None else head_weight_decay
    for name, module, parameter in _trainable(head):
        decay = decay_of(name, module, parameter, default)
        group = add("distillation", None, head_lr_multiplier, decay, default)
        group["params"].append(parameter)
        group["param_names"].append(f"head.{name}")
    # Stable: otherwise in the order of the model's parameters.
    order = sorted(groups, key=lambda k: (k[0], layers + 1 if k[1] is None else k[1]))
    return [groups[key] for key in order]


def split_model(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The bare detector of a model, and what is trained beside it (an empty module if nothing)."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    if isinstance(model, DistilledDetector):
        return model.student, model.head
    return model, nn.Module()


def is_norm(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a module's own parameter is one of a normalisation.

    By the name of its class or of one it derives from: torch, Detectron2 (its LayerNorm over NCHW,
    CycleBatchNormList) and timm (LayerNorm2d, RmsNorm, GlobalResponseNorm, EvoNorm) have no common
    base. A matrix is none whatever the class is called: ``NormedLinear`` normalises its weight.
    """
    named = any("Norm" in base.__name__ for base in type(module).__mro__)
    return named and (parameter.ndim <= 1 or isinstance(module, nn.LayerNorm))


def depth_of(name: str, num_layers: int) -> int:
    """The depth of a parameter in a ViT trunk, from 0 to ``num_layers + 1``.

    0: what makes the tokens (patch and position embedding, class and register tokens, the norm
    before the first block). N + 1: block N. ``num_layers + 1``: everything else, which is the
    trunk's last norm, the pyramid, the detector's heads, and the convolutions that ViTDet adds
    to a pretrained block (``residual``). As Detectron2's ``get_vit_lr_decay_rate``, which puts
    timm's tokens and ``norm_pre`` last and takes a block's number within a stage for its depth.

    Args:
        name: the detector's own (``backbone.net.blocks.3.attn.qkv.weight``).
        num_layers: number of blocks.
    """
    if name.startswith(("student.", "module.")):
        raise ValueError(f"{name} is not the detector's own name: its depth would be lost")
    if _STEM.match(name):
        return 0
    block = _BLOCK.match(name)
    return int(block[1]) + 1 if block and ".residual." not in name else num_layers + 1


def describe_groups(optimizer: Optimizer) -> str:
    """A table of an optimizer's groups: rates are those before the schedule, sizes in numbers."""
    rows = []
    for index, group in enumerate(optimizer.param_groups):
        names: Sequence[str] = group.get("param_names", ())
        examples = ", ".join(names[:_EXAMPLES]) + (", ..." if len(names) > _EXAMPLES else "")
        rows.append(
            (
                group.get("name", str(index)),
                len(group["params"]),
                sum(p.numel() for p in group["params"]),
                group.get("initial_lr", group["lr"]),
                group.get("weight_decay", 0.0),
                examples,
            )
        )
    headers = ("group", "tensors", "parameters", "lr", "weight decay", "such as")
    return tabulate(rows, headers, tablefmt="pipe", floatfmt=".4g", intfmt=",")


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """(name, the module that owns it, parameter) of each, a shared one once, under its first."""
    seen: set[int] = set()
    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{name}".lstrip("."), owner, parameter


def _check_overrides(
    overrides: Mapping[str, Mapping[str, float]], names: Sequence[str]
) -> dict[str, dict[str, float]]:
    checked = {}
    if not isinstance(overrides, Mapping):
        raise UserError(
            f"optimizer.params.overrides is {overrides!r}; it must give settings by pattern, "
            "{'*bias': {weight_decay: 0}}"
        )
    for pattern, values in overrides.items():
        if not isinstance(values, Mapping) or not values or set(values) - _OVERRIDES:
            raise UserError(
                f"optimizer.params.overrides of {pattern!r} is {values}: it must give "
                f"{' or '.join(sorted(_OVERRIDES))}"
            )
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"optimizer.params.overrides: no parameter of the detector matches {pattern!r}: "
                f"patterns are over whole names, such as {names[0]!r} or '*bias'"
            )
        checked[pattern] = dict(values)
    return checked


def _count_layers(lr_decay: float, num_layers: int | None, names: Sequence[str]) -> int:
    if not 0 < lr_decay <= 1:
        raise UserError(f"optimizer.params.lr_decay is {lr_decay}; it must be in (0, 1], or null")
    blocks = {int(block[1]) for name in names if (block := _BLOCK.match(name))}
    if not blocks:
        raise UserError(
            f"optimizer.params.lr_decay is {lr_decay}, but no parameter is called "
            "backbone.(...).blocks.N: layer decay is for plain ViTs, set lr_decay=null"
        )
    count = max(blocks) + 1
    if num_layers not in (None, count):
        raise UserError(
            f"optimizer.params.num_layers is {num_layers}, but the backbone has {count} blocks: "
            "set it to that, or to null"
        )
    return count


def _group_name(part: str, layer: int | None, scale: float, decay: float, default: float) -> str:
    """Names what sets a group apart, such as ``detector/layer_3/no_decay``."""
    pieces = [part]
    if layer is not None:
        pieces.append(f"layer_{layer}")
    if scale != 1:
        pieces.append(f"lr_x{scale}")
    pieces.append("no_decay" if decay == 0 else "decay" if decay == default else f"decay_{decay}")
    return "/".join(pieces)

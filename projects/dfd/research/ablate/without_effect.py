"""Settings that cells differ in, and that change nothing in their runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ...engine.config.grammar import split_override
from ...engine.config.load import ConfigFile
from .cells import Cell

_WEIGHTS = ("model.head.weight", "model.head.criterion.weight")


def without_effect(config: ConfigFile, cells: Sequence[Cell]) -> list[str]:
    """What to say of cells that differ in the strength of a distillation that is held to a limit.

    Args:
        config: of the ablation.
        cells: as ``cells.make_cells`` gives them.
    """
    # Most only switch it off in a cell, which needs no look at any config.
    given = [split_override(text)[1:] for cell in cells for text in cell.overrides]
    if not any(key in _WEIGHTS and value.strip() not in ("0", "0.0") for key, value in given):
        return []
    alike: list[tuple[Any, list[str]]] = []
    for cell in cells:
        rest = _without_weights(config.load(cell.overrides))
        if rest is None:
            continue
        names = next((names for other, names in alike if other == rest), None)
        if names is None:
            alike.append((rest, [cell.name]))
        else:
            names.append(cell.name)
    return [
        f"{' and '.join(names)} differ in the weight of distillation alone, which changes nothing "
        "while the limit of its gradient holds: set model.head.gradient_share instead"
        for _, names in alike
        if len(names) > 1
    ]


def _without_weights(cfg: DictConfig) -> Any:
    """A config but for the weights; None where there is no limit, or no distillation."""
    share = OmegaConf.select(cfg, "model.head.gradient_share", default=1.0)
    weights = [OmegaConf.select(cfg, key, default=1.0) for key in _WEIGHTS]
    head = OmegaConf.select(cfg, "model.head")
    if OmegaConf.select(cfg, "model.teacher") is None or not isinstance(head, DictConfig):
        return None
    if share is None or share == math.inf or 0 in weights:
        return None
    for key in _WEIGHTS:
        OmegaConf.update(cfg, key, None, force_add=True)
    return OmegaConf.to_container(cfg, resolve=False)

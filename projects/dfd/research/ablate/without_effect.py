"""Settings that cells differ in, and that change nothing in their runs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ...engine.config.grammar import split_override
from ...engine.config.load import ConfigFile
from .cells import Cell

_WEIGHT = re.compile(r"model\.head\.(criterion\.)?weight|criteria\.\w+\.weight")


def without_effect(config: ConfigFile, cells: Sequence[Cell]) -> list[str]:
    """What to say of cells that differ in the strength of a distillation that is held to a limit.

    Args:
        config: of the ablation.
        cells: as ``cells.make_cells`` gives them.
    """
    # Most only switch it off in a cell, which needs no look at any config.
    given = [split_override(text)[1:] for cell in cells for text in cell.overrides]
    strengths = [value for key, value in given if key and _WEIGHT.fullmatch(key)]
    if all(value.strip() in ("0", "0.0") for value in strengths):
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
    try:
        parts = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException:  # The run says what of it is wrong.
        return None
    model = parts.get("model")
    head = model.get("head") if isinstance(model, dict) else None
    if not isinstance(head, dict) or model.get("teacher") is None:
        return None
    share, criterion = head.get("gradient_share", 1.0), head.get("criterion")
    weighted = [part for part in (head, criterion) if isinstance(part, dict)]
    if share in (None, math.inf) or any(part.get("weight") == 0 for part in weighted):
        return None
    named = parts.get("criteria")
    others = named.values() if isinstance(named, dict) else ()
    for part in [*weighted, *(other for other in others if isinstance(other, dict))]:
        part.pop("weight", None)
    return parts

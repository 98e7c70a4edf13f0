"""Checkpoints of other code under the keys of ``RepPoints`` over Detectron2's FPN and ResNet."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_FIRST_LEVEL, _LAST_OF_FPN = 3, 5


def convert_weights(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict of mmdet (1 to 3), or of the authors' code, under this project's keys.

    One of another layout is returned as it is; so is, under its own key, what has no place here,
    for strict loading to name.
    """
    if not any(key.startswith(("bbox_head.", "neck.")) for key in state):
        return state
    return {
        _own_key(key): value
        for key, value in state.items()
        if not key.endswith(".num_batches_tracked")
    }


def _own_key(key: str) -> str:
    part, _, rest = key.partition(".")
    if part == "backbone":
        return f"backbone.bottom_up.{_of_trunk(rest)}"
    if part == "bbox_head":
        return f"head.{rest}"
    level = re.fullmatch(r"(lateral|fpn)_convs\.(\d+)\.(conv|gn|bn)\.(\w+)", rest)
    return f"backbone.{_of_pyramid(*level.groups())}" if part == "neck" and level else key


def _of_trunk(name: str) -> str:
    stage = re.match(r"layer(\d+)\.", name)
    name = f"res{int(stage[1]) + 1}.{name[stage.end() :]}" if stage else f"stem.{name}"
    for theirs, ours in (
        ("downsample.0.", "shortcut."),
        ("downsample.1.", "shortcut.norm."),
        ("conv2_offset.", "conv2.conv_offset."),  # Until mmdet 1.0.
    ):
        name = name.replace(theirs, ours)
    return re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)


def _of_pyramid(kind: str, index: str, layer: str, leaf: str) -> str:
    level = _FIRST_LEVEL + int(index)
    if kind == "lateral":
        name = f"fpn_lateral{level}"
    elif level <= _LAST_OF_FPN:
        name = f"fpn_output{level}"
    else:
        name = f"top_block.p{level}"
    return f"{name}.{leaf}" if layer == "conv" else f"{name}.norm.{leaf}"

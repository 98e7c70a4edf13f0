"""What the head of a detector predicts at the cells of its pyramid, read alike for every kind.

Shape shorthand: N images, A anchors a cell, K classes (1 of proposals), H x W cells of one level.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from torch import Tensor, nn

from ..errors import UserError
from ..losses.predictions import Predictions


def head_of(model: nn.Module, who: str) -> tuple[nn.Module, list[str]]:
    """The module that predicts at the cells of a pyramid, and the names of its levels.

    A proposal generator's ``rpn_head``, or the ``head`` of Detectron2's dense detectors (RetinaNet,
    FCOS) and of any other that has a ``read_head(output, boxes)``, which gives the logits of each
    level and, if asked, boxes, as in ``Predictions``.

    Raises:
        UserError: the detector is of another kind.
    """
    generator = getattr(model, "proposal_generator", None)
    if hasattr(generator, "rpn_head"):
        return generator.rpn_head, list(generator.in_features)
    if isinstance(model, DenseDetector) or hasattr(model, "read_head"):
        return model.head, list(model.head_in_features)
    raise UserError(
        f"model.predictions: the {who}, a {type(model).__name__}, has no head that is known to "
        "predict at the cells of its pyramid: set it to null"
    )


@contextlib.contextmanager
def tap_head(model: nn.Module, who: str) -> Iterator[list[Any]]:
    """Within the context, what the head puts out is left here, for :func:`read_head`."""
    head, _ = head_of(model, who)
    outputs: list[Any] = []
    handle = head.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def run_head(model: nn.Module, pyramid: Mapping[str, Tensor], *, stems: bool = False) -> Any:
    """What the head puts out for a pyramid, in fp32 and on the pyramid's device.

    Args:
        stems: whether these are what the stems of the head have put out.
    """
    head, names = head_of(model, "teacher")
    features = {name: pyramid[name].float() for name in names}
    device = features[names[0]].device
    head.to(device)
    with torch.autocast(device.type, enabled=False):
        if hasattr(model, "run_head"):
            return model.run_head(features, stems=stems)
        return head(list(features.values()))


def read_head(model: nn.Module, output: Any, *, boxes: bool) -> dict[str, Predictions]:
    """The predictions of each level in fp32, from what the head has put out.

    Args:
        boxes: whether to decode boxes too.
    """
    _, names = head_of(model, "detector")
    if hasattr(model, "read_head"):
        levels = model.read_head(output, boxes=boxes)
    else:
        logits = [level.float() for level in output[0]]
        found = _boxes(model, logits, output[1]) if boxes else [None] * len(logits)
        levels = zip(logits, found, strict=True)
    return {name: Predictions(*level) for name, level in zip(names, levels, strict=True)}


def _boxes(model: nn.Module, logits: Sequence[Tensor], deltas: Sequence[Tensor]) -> list[Tensor]:
    """Of each level (N,4A,H,W), from the anchors of the owner of the head."""
    owner = getattr(model, "proposal_generator", None) or model
    anchors = owner.anchor_generator.to(logits[0].device)(logits)
    return [
        _apply_deltas(owner.box2box_transform, of_level.float(), anchor.tensor)
        for of_level, anchor in zip(deltas, anchors, strict=True)
    ]


def _apply_deltas(transform: Any, deltas: Tensor, anchors: Tensor) -> Tensor:
    """(N,4A,H,W) boxes of deltas of that shape; the anchors (HWA,4) in Detectron2's order."""
    images, channels, height, width = deltas.shape
    rows = permute_to_N_HWA_K(deltas, 4).flatten(0, 1)
    boxes = transform.apply_deltas(rows, anchors.repeat(images, 1))
    return boxes.view(images, height, width, channels).permute(0, 3, 1, 2)

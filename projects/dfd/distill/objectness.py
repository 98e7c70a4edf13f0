"""How sure a frozen detector is of an object at each cell of its pyramid, told by its own head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from detectron2.modeling import FCOS, RetinaNet
from torch import Tensor, nn


def scored_levels(model: nn.Module) -> list[str]:
    """The levels of which a detector scores the cells; none, if it is of no known kind.

    Two-stage detectors have a proposal generator with an ``rpn_head``; RetinaNet and FCOS are
    known; any other has an ``object_scores(pyramid, stems)`` and ``head_in_features``.
    """
    if _rpn_head(model) is not None:
        return list(model.proposal_generator.in_features)
    if isinstance(model, RetinaNet | FCOS) or hasattr(model, "object_scores"):
        return list(model.head_in_features)
    return []


@torch.no_grad()
def object_scores(
    model: nn.Module, pyramid: Mapping[str, Tensor], *, stems: bool = False
) -> dict[str, Tensor]:
    """What stands for an object in each kind of detector, the largest over anchors and classes.

    A proposal generator's objectness; RetinaNet's and RepPoints' class scores; FCOS' and YOLOX'
    class scores times centreness or objectness (of FCOS the square root), as they rank detections.

    Args:
        pyramid: level name to (N,C,H,W), in any precision and on any device.
        stems: whether these are what the stems of the head have put out.

    Returns:
        Level name to (N,H,W) fp32 from 0 to 1, of ``scored_levels``.
    """
    names = scored_levels(model)
    features = [pyramid[name].float() for name in names]
    device = features[0].device
    with torch.autocast(device.type, enabled=False):
        if _rpn_head(model) is not None:
            logits, _ = _rpn_head(model).to(device)(features)
            scores = [level.sigmoid() for level in logits]
        elif isinstance(model, FCOS):
            logits, _, centres = model.head.to(device)(features)
            pairs = zip(logits, centres, strict=True)
            scores = [(level.sigmoid() * centre.sigmoid()).sqrt() for level, centre in pairs]
        elif isinstance(model, RetinaNet):
            logits, _ = model.head.to(device)(features)
            scores = [level.sigmoid() for level in logits]
        else:
            model.head.to(device)
            named = dict(zip(names, features, strict=True))
            scores = model.object_scores(named, stems=stems).values()
        return {n: score.amax(dim=1) for n, score in zip(names, scores, strict=True)}


def _rpn_head(model: nn.Module) -> nn.Module | None:
    return getattr(getattr(model, "proposal_generator", None), "rpn_head", None)

"""Detectors as functions of an image of one size, in a form that ``torch.export`` takes.

Detectron2's own decoding asks its tensors how many of something there are and chooses its way by
that. Here it is written with a fixed number of candidates: the best so many of each level, in place
of all above a threshold, of which the best so many are taken. Suppression looks at better
candidates alone, so leaving out those below the threshold after it is leaving them out before.

Shape shorthand: N candidates, A cells times anchors of a level, C classes, D detections.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.modeling import FCOS, GeneralizedRCNN, RetinaNet
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from torch import Tensor, nn
from torchvision.ops import nms

from ..distill.contract import check_fits_square_padding
from ..errors import UserError
from ..modeling import YOLOX, RepPoints
from ..modeling.yolox.detector import PAD_VALUE
from ..modeling.yolox.head import decode

# Below any score: a candidate that is none.
_NONE = -1.0e9
Found = tuple[Tensor, Tensor, Tensor]


def fixed_size(model: nn.Module, height: int, width: int) -> nn.Module:
    """The detector as a module from (3,height,width) uint8 to boxes (D,4), scores and classes (D,).

    Raises:
        UserError: it is of a kind that is not written so.
    """
    two_stage = isinstance(model, GeneralizedRCNN)
    heads = getattr(model, "roi_heads", None)
    if isinstance(model, YOLOX):
        return _FixedYOLOX(model, height, width)
    if isinstance(model, RepPoints):
        return _FixedRepPoints(model, height, width)
    if isinstance(model, RetinaNet | FCOS):
        return _FixedAnchors(model, height, width)
    if two_stage and isinstance(heads, StandardROIHeads):
        kind = _FixedCascade if isinstance(heads, CascadeROIHeads) else _FixedTwoStage
        return kind(model, height, width)
    what = f" with {type(heads).__name__}" if two_stage else ""
    raise UserError(
        f"a {type(model).__name__}{what} is not exported to torch.export's form: write an .onnx"
    )


class _Fixed(nn.Module):
    """What all kinds share: the image, normalised and padded as the detector does it."""

    def __init__(self, model: nn.Module, height: int, width: int) -> None:
        super().__init__()
        self.model = model
        self.size = (height, width)
        with torch.no_grad():
            blank = torch.zeros(3, height, width, dtype=torch.uint8)
            check_fits_square_padding(model, [{"image": blank}], "student")
            padded = model.preprocess_image([{"image": blank}]).tensor.shape[-2:]
        self.padding = (0, int(padded[1]) - width, 0, int(padded[0]) - height)

    def features(self, image: Tensor) -> dict[str, Tensor]:
        image = (image.float() - self.model.pixel_mean) / self.model.pixel_std
        return self.model.backbone(F.pad(image, self.padding)[None])

    def clip(self, boxes: Tensor) -> Tensor:
        height, width = self.size
        x0, y0, x1, y1 = boxes.unbind(dim=-1)
        x0, x1 = x0.clamp(0, width), x1.clamp(0, width)
        return torch.stack([x0, y0.clamp(0, height), x1, y1.clamp(0, height)], dim=-1)


class _FixedAnchors(_Fixed):
    """RetinaNet and FCOS."""

    def forward(self, image: Tensor) -> Found:
        model = self.model
        pyramid = self.features(image)
        features = [pyramid[name] for name in model.head_in_features]
        logits, deltas, *more = model.head(features)
        anchors = model.anchor_generator(features)
        found = []
        for i, level in enumerate(anchors):
            scores = permute_to_N_HWA_K(logits[i], model.num_classes)[0].sigmoid()
            if more:
                scores = torch.sqrt(scores * permute_to_N_HWA_K(more[0][i], 1)[0].sigmoid())
            boxes = model.box2box_transform.apply_deltas(
                permute_to_N_HWA_K(deltas[i], 4)[0], level.tensor
            )
            found.append(_best(scores, boxes, model.test_topk_candidates))
        boxes, scores, classes = (torch.cat(parts) for parts in zip(*found, strict=True))
        kept = _suppress(boxes, scores, classes, model.test_score_thresh, model.test_nms_thresh)
        kept = kept[: model.max_detections_per_image]
        return _within(self.clip(boxes[kept]), scores[kept], classes[kept])


class _FixedRepPoints(_Fixed):
    def forward(self, image: Tensor) -> Found:
        model: RepPoints = self.model
        pyramid = self.features(image)
        logits, _, second = model.head([pyramid[name] for name in model.head_in_features])
        found = []
        for level, points, stride in zip(logits, second, model._strides, strict=True):
            boxes = model.boxes_of_level(points, stride)[0]
            scores = level.flatten(2).transpose(1, 2)[0].sigmoid()
            found.append(_best(scores, boxes, model.test_topk_candidates))
        boxes, scores, classes = (torch.cat(parts) for parts in zip(*found, strict=True))
        # It clips, and leaves out what is empty, before suppression.
        boxes = self.clip(boxes)
        scores = torch.where(_has_area(boxes), scores, _NONE)
        kept = _suppress(boxes, scores, classes, model.test_score_thresh, model.test_nms_thresh)
        kept = kept[: model.max_detections_per_image]
        return boxes[kept], scores[kept], classes[kept]


class _FixedYOLOX(_Fixed):
    def features(self, image: Tensor) -> dict[str, Tensor]:
        # Padded with grey, then normalised.
        padded = F.pad(image.float(), self.padding, value=PAD_VALUE)
        return self.model.backbone(((padded - self.model.pixel_mean) / self.model.pixel_std)[None])

    def forward(self, image: Tensor) -> Found:
        model: YOLOX = self.model
        (regression, objectness, logits), grid = model.head(self.features(image))
        x, y, w, h = decode(regression[0], grid).unbind(dim=1)
        boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=1)
        best, classes = logits[0].max(dim=1)
        scores = objectness[0].sigmoid() * best.sigmoid()
        scores = torch.where(boxes.isfinite().all(dim=1), scores, _NONE)
        kept = _suppress(
            boxes.nan_to_num(), scores, classes, model.score_thresh, model.nms_thresh, equal=True
        )
        found = _within(self.clip(boxes[kept]), scores[kept], classes[kept])
        return tuple(x[: model.max_detections] for x in found)


class _FixedTwoStage(_Fixed):
    """Faster R-CNN, boxes alone."""

    def forward(self, image: Tensor) -> Found:
        pyramid = self.features(image)
        proposals = self._proposals(pyramid)
        features = [pyramid[name] for name in self.model.roi_heads.box_in_features]
        scores, boxes, predictor = self._classified(features, proposals)
        boxes = self.clip(boxes.view(-1, boxes.shape[1] // 4, 4)).expand(-1, scores.shape[1], 4)
        above = (scores > predictor.test_score_thresh).nonzero()
        which, classes = above[:, 0], above[:, 1]
        boxes, scores = boxes[which, classes], scores[which, classes]
        kept = _suppress(boxes, scores, classes, _NONE / 2, predictor.test_nms_thresh)
        if predictor.test_topk_per_image >= 0:
            kept = kept[: predictor.test_topk_per_image]
        return _within(boxes[kept], scores[kept], classes[kept])

    def _classified(
        self, features: Sequence[Tensor], boxes: Tensor
    ) -> tuple[Tensor, Tensor, nn.Module]:
        """Scores (N,C) and boxes (N,4) or (N,4C) of the proposals; what decides over them."""
        heads: StandardROIHeads = self.model.roi_heads
        scores, boxes = self._stage(heads.box_head, heads.box_predictor, features, boxes)
        return scores, boxes, heads.box_predictor

    def _stage(
        self, head: nn.Module, predictor: nn.Module, features: Sequence[Tensor], boxes: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits, deltas = predictor(head(self._pool(features, boxes)))
        sigmoid = getattr(predictor, "use_sigmoid_ce", False)
        scores = (logits.sigmoid() if sigmoid else logits.softmax(dim=1))[:, :-1]
        return scores, predictor.box2box_transform.apply_deltas(deltas, boxes)

    def _proposals(self, pyramid: dict[str, Tensor]) -> Tensor:
        generator = self.model.proposal_generator
        features = [pyramid[name] for name in generator.in_features]
        logits, deltas = generator.rpn_head(features)
        found = []
        for i, anchors in enumerate(generator.anchor_generator(features)):
            box_dim = generator.anchor_generator.box_dim
            scores = permute_to_N_HWA_K(logits[i], 1)[0]
            boxes = generator.box2box_transform.apply_deltas(
                permute_to_N_HWA_K(deltas[i], box_dim)[0], anchors.tensor
            )
            boxes, scores, _ = _best(scores, boxes, generator.pre_nms_topk[False])
            found.append((boxes, scores, torch.full_like(scores, i, dtype=torch.int64)))
        boxes, scores, levels = (torch.cat(parts) for parts in zip(*found, strict=True))
        boxes = self.clip(boxes)
        scores = torch.where(_has_area(boxes, generator.min_box_size), scores, _NONE)
        kept = _suppress(boxes, scores, levels, _NONE / 2, generator.nms_thresh)
        return boxes[kept[: generator.post_nms_topk[False]]]

    def _pool(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """From every level, of which each box takes its own: how many it has is not asked."""
        pooler = self.model.roi_heads.box_pooler
        rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)
        # As assign_boxes_to_levels of Detectron2, which asks how many boxes there are.
        sides = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt()
        levels = pooler.canonical_level + torch.log2(sides / pooler.canonical_box_size + 1e-8)
        levels = levels.floor().clamp(pooler.min_level, pooler.max_level) - pooler.min_level
        pooled: Tensor | float = 0.0
        for i, (pool, feature) in enumerate(zip(pooler.level_poolers, features, strict=True)):
            pooled = pooled + pool(feature, rois) * (levels == i).to(rois)[:, None, None, None]
        return pooled


class _FixedCascade(_FixedTwoStage):
    """Cascade R-CNN: each stage takes the boxes of the one before; the scores are their mean."""

    def _classified(
        self, features: Sequence[Tensor], boxes: Tensor
    ) -> tuple[Tensor, Tensor, nn.Module]:
        heads: CascadeROIHeads = self.model.roi_heads
        total: Tensor | float = 0.0
        for stage, predictor in enumerate(heads.box_predictor):
            boxes = self.clip(boxes) if stage else boxes
            scores, boxes = self._stage(heads.box_head[stage], predictor, features, boxes)
            total = total + scores
        return total * (1.0 / heads.num_cascade_stages), boxes, predictor


def _best(scores: Tensor, boxes: Tensor, count: int) -> Found:
    """The best pairs of cell and class: (N,4), (N,) and (N,), of (A,C) and (A,4)."""
    classes = scores.shape[1]
    best, where = scores.flatten().topk(min(count, scores.numel()))
    return boxes[where // classes], best, where % classes


def _suppress(
    boxes: Tensor, scores: Tensor, kinds: Tensor, score: float, iou: float, equal: bool = False
) -> Tensor:
    """Which of the candidates above a score stay, best first; each kind by itself.

    Args:
        equal: whether a score that equals the lowest will do.
    """
    # As torchvision does it. The zero: there may be none.
    largest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max()
    boxes = boxes + (kinds.to(boxes) * (largest + 1))[:, None]
    # Two that are none and meet no other: a program takes it for granted that two or more are kept.
    aside = boxes.new_tensor([[-4.0, -4.0, -3.0, -3.0], [-2.0, -2.0, -1.0, -1.0]]) * 1e6
    scores = torch.cat([scores, scores.new_full((2,), 2 * _NONE)])
    kept = nms(torch.cat([boxes, aside]), scores, iou)
    return kept[scores[kept] >= score] if equal else kept[scores[kept] > score]


def _has_area(boxes: Tensor, threshold: float = 0.0) -> Tensor:
    sides = boxes[:, 2:] - boxes[:, :2]
    return (sides > threshold).all(dim=1)


def _within(boxes: Tensor, scores: Tensor, classes: Tensor) -> Found:
    """Those of some area."""
    kept = _has_area(boxes)
    return boxes[kept], scores[kept], classes[kept]

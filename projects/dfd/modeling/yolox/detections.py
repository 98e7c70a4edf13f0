"""From YOLOX's raw outputs to the detections of an image.

Shape shorthand: A cells of all levels, C classes, D detections.
"""

from __future__ import annotations

from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import batched_nms, box_convert


def detect(
    boxes: Tensor,
    objectness_logits: Tensor,
    class_logits: Tensor,
    image_size: tuple[int, int],
    *,
    score_thresh: float,
    nms_thresh: float,
    max_detections: int | None = None,
) -> Instances:
    """
    Every cell gives one detection at most, of its likeliest class, with the probability of an
    object times that of the class as its score. Suppression is class by class.

    Args:
        boxes: (A,4) float32: centre x, y, width, height, pixels.
        objectness_logits: (A,) float32.
        class_logits: (A,C) float32.
        image_size: height and width of the image without its padding; boxes are clipped to it
            after suppression, and those outside it left out.
        score_thresh: lowest score.
        nms_thresh: IoU with a better one of its class above which a detection is left out.
        max_detections: the best so many; None: all.

    Returns:
        ``pred_boxes``, ``scores`` and ``pred_classes`` (D,...), best first.
    """
    best_logits, classes = class_logits.max(dim=1)
    scores = objectness_logits.sigmoid() * best_logits.sigmoid()
    # A width whose exponential is no float32 is no box.
    found = (scores >= score_thresh) & boxes.isfinite().all(dim=1)
    corners = box_convert(boxes[found], "cxcywh", "xyxy")
    scores, classes = scores[found], classes[found]
    kept = batched_nms(corners, scores, classes, nms_thresh)
    result = Instances(
        image_size,
        pred_boxes=Boxes(corners[kept]),
        scores=scores[kept],
        pred_classes=classes[kept],
    )
    result.pred_boxes.clip(image_size)
    result = result[result.pred_boxes.nonempty()]
    return result if max_detections is None else result[:max_detections]

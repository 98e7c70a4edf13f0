"""What the exported forms of a student have in common: they are called as a detector is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.modeling import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor


class ExportedModel(ABC):
    """A file of ``dfd export``, called with Detectron2's batches and in its form, on the CPU.

    Attributes:
        metadata: what ``dfd export`` said of the student.
    """

    metadata: dict[str, Any]

    @abstractmethod
    def _run(self, image: Tensor) -> Sequence[Tensor]:
        """Boxes, scores and classes in an image (3,height,width) uint8."""

    @torch.no_grad()
    def __call__(self, batch: Sequence[Mapping[str, Any]]) -> list[dict[str, Instances]]:
        """
        Args:
            batch: one dict an image: ``image`` (3,height,width) uint8; ``height`` and ``width``
                that the boxes are scaled to, its own by default.

        Raises:
            UserError: the exported form fails on an image, or is of another size.
        """
        results = []
        for item in batch:
            image = item["image"].cpu()
            size = tuple(image.shape[-2:])
            boxes, scores, classes = self._run(image)
            found = Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
            height, width = item.get("height", size[0]), item.get("width", size[1])
            results.append({"instances": detector_postprocess(found, height, width)})
        return results

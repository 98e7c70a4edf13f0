"""YOLOX as a detector of Detectron2.

Shape shorthand: N images, A cells of all levels, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.modeling import Backbone, detector_postprocess
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torchvision.ops import box_convert

from ...errors import UserError
from ...ranges import check_choice, check_count, check_positive, check_probability, is_number
from .assign import FORMS
from .blocks import ACTIVATIONS
from .detections import detect
from .head import Grid, Predictions, YOLOXHead, by_level, decode
from .losses import Objects, yolox_losses
from .network import LEVELS, PAFPN
from .weights import from_mmdet, is_mmdet

# The grey around the authors' images, on [0, 255].
PAD_VALUE = 114.0


class YOLOX(nn.Module):
    """YOLOX (Ge et al., 2021), with the keys of the authors' code, so that their ``.pth`` loads.

    Images are padded to a multiple of 32 at their right and bottom with the authors' grey of 114.
    ``head.stems`` is the first convolution of the heads, one per level, and runs once in a forward.

    In training it gives ``loss_iou`` (five times), ``loss_obj``, ``loss_cls`` and, when it is on,
    ``loss_l1``: sums over the batch divided by its number of positive cells, at least 1.
    """

    def __init__(
        self,
        *,
        depth: float,
        width: float,
        num_classes: int,
        depthwise: bool = False,
        activation: str = "silu",
        trunk: Backbone | None = None,
        form: str = "main",
        score_thresh: float = 0.01,
        nms_thresh: float = 0.65,
        max_detections: int | None = None,
        l1_from_iter: int | None = None,
        pixel_mean: Sequence[float] = (0.0, 0.0, 0.0),
        pixel_std: Sequence[float] = (1.0, 1.0, 1.0),
        input_format: str = "BGR",
    ) -> None:
        """
        ``named_yolox`` has the published depths and widths.

        Args:
            depth: times the number of bottlenecks; 1 is YOLOX-l.
            width: times the channels, a multiple of 1/64; 1 is YOLOX-l.
            num_classes: C.
            depthwise: 3x3 convolutions are a depthwise and a pointwise one, as in YOLOX-nano.
            activation: "silu", "relu" or "lrelu" (leaky, 0.1).
            trunk: in place of the CSPDarknet, such as a TimmPyramid, with levels at strides 8, 16
                and 32; depth and width are then those of the neck and the heads.
            form: of SimOTA, the authors' matching. "main": their code since January 2023, a
                little better by their account. "v030": that of their releases 0.1 to 0.3, with
                which all published checkpoints were trained. Evaluation is the same.
            score_thresh: lowest score of a detection. 0.01 is what the authors' evaluation takes;
                the command for AP in their README takes 0.001, their demonstration 0.25.
            nms_thresh: IoU above which the lesser of two detections of a class is left out; the
                authors' demonstration takes 0.45.
            max_detections: per image. None, no limit, is the authors': COCO's AP takes the best
                100 of each class.
            l1_from_iter: the iteration from which ``loss_l1`` is on, as the run's event storage
                counts them, resumed or not; None: never. The authors' is on in the last epochs,
                without mosaic.
            pixel_mean, pixel_std: on [0, 255], in the order of ``input_format``. The defaults are
                those of the authors' weights since release 0.1.1; older ones ("legacy") need RGB
                with ImageNet's mean and standard deviation.
            input_format: "BGR" or "RGB", the order that ``image`` is given in.

        Raises:
            UserError: a setting outside its range.
        """
        super().__init__()
        _check_size(depth, width, num_classes, activation)
        _check_settings(score_thresh, nms_thresh, max_detections, l1_from_iter, input_format)
        check_choice("YOLOX: form", form, FORMS)
        kind = {"width": width, "depthwise": depthwise, "activation": activation}
        self.backbone = PAFPN(depth=depth, trunk=trunk, **kind)
        self.head = YOLOXHead(num_classes=num_classes, **kind)
        self.num_classes = num_classes
        self.form = form
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.max_detections = max_detections
        self.l1_from_iter = l1_from_iter
        self.input_format = input_format
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, _per_channel(name, values), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def head_in_features(self) -> list[str]:
        return list(LEVELS)

    def object_scores(
        self, pyramid: Mapping[str, Tensor], *, stems: bool = False
    ) -> dict[str, Tensor]:
        """Objectness times each class's score.

        Args:
            pyramid: level name to the backbone's features, or to those of the head's stems.

        Returns:
            Level name to (N,C,H,W).
        """
        return self.head.object_scores(pyramid if stems else self.head.stems(pyramid))

    def run_head(
        self, pyramid: Mapping[str, Tensor], *, stems: bool = False
    ) -> tuple[Predictions, Grid]:
        """What the head puts out for the backbone's features, or for those of the head's stems."""
        return self.head.predict(pyramid if stems else self.head.stems(pyramid))

    def read_head(
        self, output: tuple[Predictions, Grid], boxes: bool
    ) -> list[tuple[Tensor, Tensor | None]]:
        """What the head put out by level, see ``head.by_level``."""
        return by_level(*output, boxes)

    def preprocess_image(self, batched_inputs: Sequence[Mapping[str, Any]]) -> ImageList:
        """Pad, then normalise, so that the padding is grey like a pixel that is."""
        images = ImageList.from_tensors(
            [item["image"].to(self.pixel_mean) for item in batched_inputs],
            pad_value=PAD_VALUE,
            padding_constraints=self.backbone.padding_constraints,
        )
        return ImageList((images.tensor - self.pixel_mean) / self.pixel_std, images.image_sizes)

    def forward(
        self, batched_inputs: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """
        Args:
            batched_inputs: one dict an image: ``image`` (3,height,width) on [0, 255]; in training
                ``instances`` with ``gt_boxes`` and ``gt_classes``; in evaluation ``height`` and
                ``width`` that the detections are scaled to, its own by default.

        Returns:
            In training, losses by name; in evaluation, a dict an image, whose ``instances`` has
            ``pred_boxes``, ``scores`` and ``pred_classes``.
        """
        images = self.preprocess_image(batched_inputs)
        predictions, grid = self.head(self.backbone(images.tensor))
        if not self.training:
            return self._detections(predictions, grid, images.image_sizes, batched_inputs)
        return yolox_losses(
            predictions,
            grid,
            [_objects(item["instances"], self.device) for item in batched_inputs],
            divisor=self.divisor,
            form=self.form,
            l1=self._l1_is_on(),
        )

    def divisor(self, positives: Tensor) -> Tensor:
        """What the losses are divided by, for this many positive cells."""
        return positives.clamp(min=1)

    def convert_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights in mmdet's layout under this model's keys; others as they are.

        Raises:
            UserError: mmdet's model normalises its images by another mean or deviation.
        """
        if not is_mmdet(state):
            return dict(state)
        for key in ("mean", "std"):
            theirs = state.get(f"data_preprocessor.{key}")
            ours = getattr(self, f"pixel_{key}").flatten()
            if theirs is None or ours.is_meta:
                continue
            theirs, ours = theirs.flatten().float().cpu(), ours.cpu()
            if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-4):
                raise UserError(
                    f"YOLOX: these weights of mmdet want pixel_{key}="
                    f"{[round(v, 3) for v in theirs.tolist()]}, but the config has "
                    f"{[round(v, 3) for v in ours.tolist()]}"
                )
        return from_mmdet(state)

    def _l1_is_on(self) -> bool:
        return self.l1_from_iter is not None and get_event_storage().iter >= self.l1_from_iter

    def _detections(
        self,
        predictions: Predictions,
        grid: Grid,
        image_sizes: Sequence[tuple[int, int]],
        batched_inputs: Sequence[Mapping[str, Any]],
    ) -> list[dict[str, Instances]]:
        with torch.autocast(self.device.type, enabled=False):
            regression, objectness, classes = (part.float() for part in predictions)
            boxes = decode(regression, grid)
            results = []
            for i, (item, size) in enumerate(zip(batched_inputs, image_sizes, strict=True)):
                found = detect(
                    boxes[i],
                    objectness[i],
                    classes[i],
                    size,
                    score_thresh=self.score_thresh,
                    nms_thresh=self.nms_thresh,
                    max_detections=self.max_detections,
                )
                height, width = item.get("height", size[0]), item.get("width", size[1])
                results.append({"instances": detector_postprocess(found, height, width)})
        return results


def _objects(instances: Instances, device: torch.device) -> Objects:
    boxes = instances.gt_boxes.tensor.to(device, torch.float32)
    classes = instances.gt_classes.to(device, torch.int64)
    return Objects(box_convert(boxes, "xyxy", "cxcywh"), classes)


def _per_channel(name: str, values: Sequence[float]) -> Tensor:
    numbers = list(values) if isinstance(values, Sequence) else []
    positive = name == "pixel_std"
    if len(numbers) != 3 or not all(is_number(v) and (v > 0 or not positive) for v in numbers):
        raise UserError(
            f"YOLOX: {name} is {values!r}; it must be three numbers{' above 0' if positive else ''}"
        )
    return torch.tensor(numbers, dtype=torch.float32).view(3, 1, 1)


def _check_size(depth: float, width: float, num_classes: int, activation: str) -> None:
    check_positive("YOLOX: depth", depth)
    # Otherwise the trunk's channels, rounded, would not double from stage to stage.
    if not is_number(width) or width < 1 / 64 or int(1024 * width) != 16 * int(64 * width):
        raise UserError(f"YOLOX: width is {width!r}; it must be a multiple of 1/64, as 0.5")
    check_count("YOLOX: num_classes", num_classes, 1)
    check_choice("YOLOX: activation", activation, ACTIVATIONS)


def _check_settings(
    score_thresh: float,
    nms_thresh: float,
    max_detections: int | None,
    l1_from_iter: int | None,
    input_format: str,
) -> None:
    check_probability("YOLOX: score_thresh", score_thresh)
    check_probability("YOLOX: nms_thresh", nms_thresh)
    if max_detections is not None:
        check_count("YOLOX: max_detections", max_detections, 1)
    if l1_from_iter is not None:
        check_count("YOLOX: l1_from_iter", l1_from_iter, 0)
    check_choice("YOLOX: input_format", input_format, ("BGR", "RGB"))

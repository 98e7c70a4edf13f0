"""RepPoints as a Detectron2 meta-architecture.

Yang et al., "RepPoints: Point Set Representation for Object Detection", ICCV 2019.

Shape shorthand: N images, A cells of all levels, K classes, M objects of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import batched_nms
from detectron2.modeling import Backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from fvcore.nn import sigmoid_focal_loss, smooth_l1_loss
from torch import Tensor

from ...errors import UserError
from ...ranges import check_choice, check_count, check_positive, check_probability
from .assign import IGNORED, assign_boxes, assign_points, check_overlaps
from .head import RepPointsHead
from .points import cell_points, cells_within
from .weights import convert_weights

_ASSIGNERS = ("point", "max_iou")


class RepPoints(DenseDetector):
    """A detector without anchors, which regresses nine points of an object in two steps.

    Its losses are ``loss_cls``, ``loss_pts_init`` (boxes of the first points) and
    ``loss_pts_refine`` (of the second).
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        head: RepPointsHead,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
        head_in_features: Sequence[str] | None = None,
        init_assigner: str = "point",
        init_num_pos: int = 1,
        point_base_scale: float = 4,
        positive_iou: float = 0.5,
        negative_iou: float = 0.4,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        smooth_l1_beta: float = 0.11,
        init_loss_weight: float = 0.5,
        refine_loss_weight: float = 1.0,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.5,
        max_detections_per_image: int = 100,
    ) -> None:
        """
        Args:
            head_in_features: names of the levels; None: all of the backbone.
            init_assigner: by what the first points are trained: "point", the cells nearest to an
                object, or "max_iou", the overlap of a box of ``point_base_scale`` cells at a cell.
            init_num_pos: cells of an object under "point".
            point_base_scale: size of an object in cells of its level; boxes are compared in it.
            positive_iou, negative_iou: see ``assign_boxes``; by it classes and second points are
                trained.
            test_topk_candidates: pairs of cell and class of a level that go into the NMS.

        Raises:
            UserError: settings that do not fit each other, or one outside its range.
        """
        super().__init__(
            backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        if head.num_classes != num_classes:
            raise UserError(
                f"RepPoints: num_classes is {num_classes}, but that of its head {head.num_classes}"
            )
        check_choice("RepPoints: init_assigner", init_assigner, _ASSIGNERS)
        check_overlaps(positive_iou, negative_iou)
        check_count("RepPoints.init_num_pos", init_num_pos, 1)
        check_positive("RepPoints.point_base_scale", point_base_scale)  # Boxes are divided by it.
        check_probability("RepPoints.test_score_thresh", test_score_thresh)
        check_probability("RepPoints.test_nms_thresh", test_nms_thresh)
        check_count("RepPoints.test_topk_candidates", test_topk_candidates, 1)
        check_count("RepPoints.max_detections_per_image", max_detections_per_image, 1)
        self.num_classes = num_classes
        self.input_format = input_format
        shapes = backbone.output_shape()
        self._strides = [shapes[name].stride for name in self.head_in_features]
        self.init_assigner, self.init_num_pos = init_assigner, init_num_pos
        self.point_base_scale = point_base_scale
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.focal_loss_alpha, self.focal_loss_gamma = focal_loss_alpha, focal_loss_gamma
        self.smooth_l1_beta = smooth_l1_beta
        self.init_loss_weight, self.refine_loss_weight = init_loss_weight, refine_loss_weight
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """As Detectron2's detectors; objects without area are left out of the training."""
        if self.training:
            # Here and not later, for labels are on the CPU still, which need not wait.
            batched_inputs = [
                {**item, "instances": item["instances"][item["instances"].gt_boxes.nonempty()]}
                for item in batched_inputs
            ]
        return super().forward(batched_inputs)

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise, pad with zeros to what the backbone needs, or else to 32, and batch."""
        images = [self._move_to_current_device(item["image"]) for item in batched_inputs]
        images = [(image - self.pixel_mean) / self.pixel_std for image in images]
        return ImageList.from_tensors(
            images, self._divisor_of_sides, padding_constraints=self.backbone.padding_constraints
        )

    def object_scores(
        self, pyramid: Mapping[str, Tensor], *, stems: bool = False
    ) -> dict[str, Tensor]:
        """Each class's score, level name to (N,K,H,W), of the backbone's features; no stems."""
        logits, _, _ = self.head([pyramid[name] for name in self.head_in_features])
        return {n: x.sigmoid() for n, x in zip(self.head_in_features, logits, strict=True)}

    @property
    def _divisor_of_sides(self) -> int:
        constraints = self.backbone.padding_constraints
        return constraints.get("size_divisibility", self.backbone.size_divisibility) or 32

    def divisor(self, positives: Tensor) -> Tensor:
        """What the losses of a batch are divided by, given a number that stands for its positives.

        A method of its own, so that processes can share it.
        """
        return positives.clamp(min=1)

    def convert_weights(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """mmdet's state dict, or that of the authors' code, under this detector's keys."""
        return convert_weights(state)

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: tuple[list[Tensor], list[Tensor], list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        logits, first, second = predictions
        cells = self._cells(logits)
        valid = [cells_within(cells, *self._own_padding(size)) for size in images.image_sizes]
        gt_boxes = [instances.gt_boxes.tensor for instances in gt_instances]
        first_boxes = self._boxes(first, cells)
        init = [
            self._assign_first(cells, boxes, inside)
            for boxes, inside in zip(gt_boxes, valid, strict=True)
        ]
        refine = [
            assign_boxes(found.detach(), boxes, self.positive_iou, self.negative_iou, inside)
            for found, boxes, inside in zip(first_boxes, gt_boxes, valid, strict=True)
        ]
        classes = [
            _gather(instances.gt_classes.long(), assigned, self.num_classes)
            for instances, assigned in zip(gt_instances, refine, strict=True)
        ]
        refine_assigned, positives = torch.stack(refine), _positives(refine)
        return {
            "loss_cls": self._class_loss(
                _flat(logits), torch.stack(classes), refine_assigned != IGNORED, positives
            ),
            "loss_pts_init": self.init_loss_weight
            * self._box_loss(first_boxes, gt_boxes, init, cells, _positives(init)),
            "loss_pts_refine": self.refine_loss_weight
            * self._box_loss(self._boxes(second, cells), gt_boxes, refine, cells, positives),
        }

    def _own_padding(self, size: Sequence[int]) -> tuple[int, int]:
        """An image's height and width as if it were padded alone; only cells in it are trained."""
        divisor = self._divisor_of_sides
        height, width = (-(-int(side) // divisor) * divisor for side in size)
        return height, width

    def _cells(self, levels: Sequence[Tensor]) -> Tensor:
        return cell_points([x.shape[-2:] for x in levels], self._strides, levels[0].device)

    def _boxes(self, points: Sequence[Tensor], cells: Tensor) -> Tensor:
        """(N,A,4) XYXY in pixels of the points of all levels."""
        boxes = _flat([self.head.boxes(level) for level in points])
        return boxes * cells[:, 2:] + cells[:, [0, 1, 0, 1]]

    def read_head(
        self, output: tuple[list[Tensor], list[Tensor], list[Tensor]], boxes: bool
    ) -> list[tuple[Tensor, Tensor | None]]:
        """What the head put out, in fp32: of each level logits (N,C,H,W) of the classes, and the
        boxes (N,4,H,W) of the second points, XYXY in pixels, if asked."""
        logits, _, second = output
        levels = []
        for scores, points, stride in zip(logits, second, self._strides, strict=True):
            found = None
            if boxes:
                found = self.boxes_of_level(points.float(), stride)
                found = found.transpose(1, 2).unflatten(2, points.shape[-2:])
            levels.append((scores.float(), found))
        return levels

    def boxes_of_level(self, points: Tensor, stride: int) -> Tensor:
        """(N,H*W,4) XYXY in pixels of one level's points (N,2P,H,W)."""
        return self._boxes([points], cell_points([points.shape[-2:]], [stride], points.device))

    def _assign_first(self, cells: Tensor, gt_boxes: Tensor, valid: Tensor) -> Tensor:
        if self.init_assigner == "point":
            return assign_points(cells, gt_boxes, self.point_base_scale, self.init_num_pos, valid)
        half = cells[:, 2:] * self.point_base_scale / 2
        boxes = torch.cat([cells[:, :2] - half, cells[:, :2] + half], dim=1)
        return assign_boxes(boxes, gt_boxes, self.positive_iou, self.negative_iou, valid)

    def _class_loss(
        self, logits: Tensor, classes: Tensor, counted: Tensor, positives: Tensor
    ) -> Tensor:
        # The last is background.
        targets = F.one_hot(classes, self.num_classes + 1)[..., :-1].to(logits.dtype)
        losses = sigmoid_focal_loss(
            logits, targets, alpha=self.focal_loss_alpha, gamma=self.focal_loss_gamma
        )
        return (losses * counted[..., None]).sum() / self.divisor(positives)

    def _box_loss(
        self,
        boxes: Tensor,
        gt_boxes: Sequence[Tensor],
        assigned: Sequence[Tensor],
        cells: Tensor,
        positives: Tensor,
    ) -> Tensor:
        targets = torch.stack(
            [_gather(of_image, to, 0) for of_image, to in zip(gt_boxes, assigned, strict=True)]
        )
        size = self.point_base_scale * cells[:, 2:]
        losses = smooth_l1_loss(boxes / size, targets.to(boxes.dtype) / size, self.smooth_l1_beta)
        counted = torch.stack(list(assigned)) >= 0
        # All cells, those that count by 0 too: every parameter has a gradient in every batch.
        return (losses * counted[..., None]).sum() / self.divisor(positives)

    def forward_inference(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: tuple[list[Tensor], list[Tensor], list[Tensor]],
    ) -> list[Instances]:
        logits, _, second = predictions
        scores = [_flat([level]).sigmoid() for level in logits]
        boxes = [
            self.boxes_of_level(level, stride)
            for level, stride in zip(second, self._strides, strict=True)
        ]
        return [
            self._detections([level[i] for level in scores], [level[i] for level in boxes], size)
            for i, size in enumerate(images.image_sizes)
        ]

    def _detections(
        self, scores: Sequence[Tensor], boxes: Sequence[Tensor], size: tuple[int, int]
    ) -> Instances:
        """Detections of one image, from each level's scores (cells,K) and boxes (cells,4)."""
        found = [self._candidates(*level) for level in zip(scores, boxes, strict=True)]
        best, where, classes = (torch.cat(parts) for parts in zip(*found, strict=True))
        candidates = Instances(size, pred_boxes=Boxes(where), scores=best, pred_classes=classes)
        candidates.pred_boxes.clip(size)
        candidates = candidates[candidates.pred_boxes.nonempty()]
        keep = batched_nms(
            candidates.pred_boxes.tensor,
            candidates.scores,
            candidates.pred_classes,
            self.test_nms_thresh,
        )
        return candidates[keep[: self.max_detections_per_image]]

    def _candidates(self, scores: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, boxes and classes of the best pairs of cell and class of a level."""
        above = scores > self.test_score_thresh
        # Sorted and cut, not topk, whose number an export would fix to that of one image.
        best, order = scores[above].sort(descending=True)
        best, order = best[: self.test_topk_candidates], order[: self.test_topk_candidates]
        which, classes = above.nonzero()[order].unbind(dim=1)
        return best, boxes[which], classes


def _flat(levels: Sequence[Tensor]) -> Tensor:
    """(N,C,H,W) of each level as (N,A,C)."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)


def _positives(assigned: Sequence[Tensor]) -> Tensor:
    """The cells that have an object; an image without one counts as one with a single one."""
    return torch.stack([(which >= 0).sum().clamp(min=1) for which in assigned]).sum().float()


def _gather(of_objects: Tensor, assigned: Tensor, otherwise: int) -> Tensor:
    """(A,...) what is of its object (M,...) for each cell, ``otherwise`` where there is none."""
    if not len(of_objects):
        return of_objects.new_full((len(assigned), *of_objects.shape[1:]), otherwise)
    none = (assigned < 0).view(-1, *[1] * (of_objects.dim() - 1))
    return of_objects[assigned.clamp(min=0)].masked_fill(none, otherwise)

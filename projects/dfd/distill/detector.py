"""The meta-architecture that trains a student detector under a frozen teacher."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from detectron2.structures import ImageList
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from ..errors import UserError
from .contract import (
    UNLABELLED,
    channel_order,
    check_fits_square_padding,
    check_not_resized,
    feature_modules,
    run_features,
    stems_of,
    tap,
)
from .head import DFDHead
from .head_outputs import read_head, tap_head
from .inherit import InheritReport, inherit_weights
from .log import DistillationLog
from .predictions import PredictionHead
from .real_pixels import image_area
from .side_stream import SideStream
from .teacher import FrozenTeacher

logger = logging.getLogger(__name__)


class DistilledDetector(nn.Module):
    """A student that learns from its labels and from the teacher's pyramid.

    In training the student's own forward gives its losses, while the output of its backbone is
    tapped; the head turns the two pyramids into ``loss_dfd_<level>``. In evaluation it is exactly
    ``student(batched_inputs)``. The student's class is not copied, subclassed or patched.
    """

    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: FrozenTeacher,
        head: DFDHead,
        predictions: PredictionHead | None = None,
        inherit: Sequence[str] = (),
        input_format: str | None = None,
        overlap: bool = False,
    ) -> None:
        """
        Args:
            student: any Detectron2 detector with a ``backbone``.
            teacher: gives the pyramid to learn.
            head: pairs the pyramids and computes the losses.
            predictions: pairs what the two heads predict, beside the pyramids; None: does not.
            inherit: parts of the student that start from the teacher's weights, see
                ``inherit.inherit_weights``; done by ``inherit_from_teacher()``.
            input_format: "BGR" or "RGB", the channel order of the batches, which is the
                student's; None to take the student's own ``input_format`` (BGR where it has none).
            overlap: run the teacher's pass beside the student's forward, on a CUDA stream of its
                own, for the memory of both at once. Elsewhere than on CUDA it changes nothing.

        Raises:
            UserError: the pyramids share no stride, or the channel order contradicts the
                student's pixel statistics.
        """
        super().__init__()
        if getattr(student, "backbone", None) is None:
            raise UserError(
                f"model.student is a {type(student).__name__} without a backbone: the student "
                "must be a Detectron2 detector"
            )
        self.student = student
        self.teacher = teacher
        self.head = head
        self.predictions = predictions
        self.inherit = tuple(inherit)
        self.input_format = channel_order(student, input_format, "student")
        if head.features["stems"] and stems_of(student) is None and stems_of(teacher.model) is None:
            raise UserError(
                f"model.head.stems is True, but neither the student, a {type(student).__name__}, "
                f"nor the teacher, a {type(teacher.model).__name__}, has stems in its head: set it "
                "to False"
            )
        modules = feature_modules(student, "student", **head.features)
        ours = [dict(module.output_shape()) for module in modules]
        theirs = teacher.output_shapes(**head.features)
        # The two pyramids, then the two trunks where those are wanted.
        shapes = itertools.chain(*zip(ours, theirs, strict=True))
        head.attach(*shapes, teacher_scale=teacher.scale)
        if predictions is not None:
            predictions.attach(student, teacher.model, teacher.scale, teacher.check_classes)
        if head.needs_objectness:
            teacher.check_objectness([pair.teacher_name for pair in head.pairs])
        for pair in head.pairs:
            logger.info(
                "Distilling %s (stride %d): student %d channels, teacher's %s %d channels, "
                "adapter %s",
                pair.name,
                pair.stride,
                pair.student_channels,
                pair.teacher_name,
                pair.teacher_channels,
                type(head.adapters[pair.name]).__name__,
            )
        self.inherit_report: InheritReport | None = None
        names = set().union(*(o for o, t in zip(ours, theirs, strict=True) if t))
        unpaired = names - {pair.name for pair in head.pairs}
        if unpaired and head.levels is None:
            logger.warning(
                "Not distilled, for the teacher has no level of that stride: %s",
                ", ".join(sorted(unpaired)),
            )
        # Iterations of the training, where it is known: what is annealed over it goes by that.
        self.max_iter: int | None = None
        self.log = DistillationLog(head.gradient_share)
        self._checked_side, self._checked_frozen = 0, False
        self.overlap = overlap
        self._side: SideStream | None = None

    @property
    def device(self) -> torch.device:
        return self.student.device

    def inherit_from_teacher(self) -> InheritReport | None:
        """Start the parts named by ``inherit`` from the teacher; None if there are none.

        Called after the student's initial weights are loaded, which would overwrite them, and not
        when a run is resumed.
        """
        if not self.inherit:
            return None
        self.inherit_report = inherit_weights(self.student, self.teacher.model, self.inherit)
        return self.inherit_report

    def forward(self, batched_inputs: Sequence[dict]) -> dict[str, Tensor] | list[dict]:
        """Losses by name in training, the student's detections in evaluation.

        Items that are ``UNLABELLED`` bring distillation losses alone, ``loss_dfd_unlabelled_*``.
        """
        check_fits_square_padding(self.student, batched_inputs, "student")
        if not self.training:
            return self.student(batched_inputs)
        self._check_sizes(batched_inputs)
        iteration = get_event_storage().iter if has_event_storage() else 0
        active = self.head.factor(iteration) > 0
        predicting = self.predictions is not None and self.predictions.factor(iteration) > 0
        labelled = [item for item in batched_inputs if not item.get(UNLABELLED)]
        unlabelled = [item for item in batched_inputs if item.get(UNLABELLED)] if active else []
        # The teacher goes first: what its pass needs is freed before the student's activations,
        # which stay until the backward pass, are made.
        needed = active or predicting
        batches = [batch for batch in (labelled, unlabelled) if batch] if needed else []
        side = self._side_stream() if needed else None
        with side.work() if side else contextlib.nullcontext():
            theirs = [self._teacher_features(batch) for batch in batches]
        # Of images without labels the student needs no more than its features.
        ours = {}
        if unlabelled:
            images = self.student.preprocess_image(unlabelled).tensor
            ours = run_features(self.student, images, "student", **self.head.features)
        modules = feature_modules(self.student, "student", **self.head.features)
        distilled = [pair.name for pair in self.head.pairs]
        split = self.head.split(iteration, ours) if active else None
        watched = tap_head(self.student, "student") if predicting else contextlib.nullcontext()
        with (
            tap(modules, split, distilled) as features,
            watched as outputs,
        ):
            losses = dict(self.student(labelled))
        if side:
            side.join()
        self._check_learns(features if active else {})
        idle = {} if active else self.head.idle_losses()
        if not needed:
            return losses | idle
        distillation, stats = {}, {}
        if active:
            distillation, stats = self._distil(batches, (features, ours), theirs, iteration)
        if predicting:
            distillation |= self._distil_predictions(
                labelled, outputs[-1], theirs[0][0], iteration
            )
        self.log.add(losses, distillation, stats)
        return losses | idle | distillation

    @torch.no_grad()
    def _check_sizes(self, batch: Sequence[dict]) -> None:
        """Of a batch with larger images than any before: some students shrink the largest alone."""
        side = max(max(item["image"].shape[-2:]) for item in batch)
        if side <= self._checked_side:
            return
        self._checked_side = side
        if hasattr(self.student, "preprocess_image"):
            images = self.student.preprocess_image(batch)
            if isinstance(images, ImageList):  # Some detectors return more than that.
                check_not_resized(self.student, batch, images, "student")

    def _check_learns(self, features: dict[str, Tensor]) -> None:
        """Tell, in the first training step, which levels the student cannot change.

        No error, as they may be unfrozen later.
        """
        if self._checked_frozen or not features or not torch.is_grad_enabled():
            return
        self._checked_frozen = True
        names = [pair.name for pair in self.head.pairs]
        frozen = [name for name in names if not features[name].requires_grad]
        if frozen:
            logger.warning(
                "Distilled in vain, for the student's %s are frozen: name the others alone in "
                "model.head.levels, or lower freeze_at",
                ", ".join(frozen),
            )

    def _side_stream(self) -> SideStream | None:
        """The stream of the teacher's pass; None: it is the student's."""
        if self._side is None and self.overlap:
            if self.device.type == "cuda":
                self._side = SideStream(self.device)
            else:
                logger.warning("model.overlap has no effect on %s", self.device.type)
                self.overlap = False
        return self._side

    def _distil(
        self,
        batches: Sequence[Sequence[dict]],
        ours: Sequence[dict[str, Tensor]],
        theirs: Sequence[tuple[dict[str, Tensor], dict[str, Tensor] | None]],
        iteration: int,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The head's losses, and what it has to log, of labelled images and of those without."""
        losses: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        images = sum(len(batch) for batch in batches)
        for batch, own, (pyramid, objectness) in zip(batches, ours, theirs, strict=False):
            found = self.head(
                own,
                pyramid,
                boxes=labelled_boxes(batch),
                iteration=iteration,
                max_iter=self.max_iter,
                objectness=objectness,
                **image_area(batch),
            )
            prefix = "loss_dfd_unlabelled_" if batch[0].get(UNLABELLED) else "loss_dfd_"
            for name, loss in found.items():
                # Each image counts as much as any other.
                share = len(batch) / images
                losses[prefix + name.removeprefix("loss_dfd_")] = share * loss
            stats = stats or self.head.stats
        return losses, stats

    def _distil_predictions(
        self, batch: Sequence[dict], output: Any, pyramid: dict[str, Tensor], iteration: int
    ) -> dict[str, Tensor]:
        """The losses between what the student's head put out and what the teacher's would."""
        boxes = self.predictions.needs_boxes
        with torch.autocast(self.device.type, enabled=False):
            ours = read_head(self.student, output, boxes=boxes)
        theirs = self.teacher.predictions(pyramid, boxes=boxes, **self.head.features)
        area = image_area(batch)
        area.pop("teacher_masks", None)
        return self.predictions(ours, theirs, iteration=iteration, **area)

    def _teacher_features(
        self, batch: Sequence[dict]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """The teacher's pyramid of a batch and, where the criterion asks for it, objectness."""
        pyramid = self.teacher(
            batch, input_format=self.input_format, device=self.device, **self.head.features
        )
        if not self.head.needs_objectness:
            return pyramid, None
        return pyramid, self.teacher.objectness(pyramid, **self.head.features)

    @torch.no_grad()
    def disparity_maps(self, batched_inputs: Sequence[dict]) -> dict[str, tuple[Tensor, Tensor]]:
        """Where student and teacher are apart: level name to (N,H,W) disparity and bool valid.

        Student and head run in eval mode, but for batch norms, which use the statistics of the
        batch as the training loss does: before the first iterations they have no others. They are
        left as they were.
        """
        check_fits_square_padding(self.student, batched_inputs, "student")
        with batch_statistics(self.student):
            images = self.student.preprocess_image(batched_inputs)
            features = run_features(self.student, images.tensor, "student", **self.head.features)
        # Without dropout in an adapter, which would draw from the training's random numbers.
        training = self.head.training
        with batch_statistics(self.head) if training else contextlib.nullcontext():
            return self._maps(batched_inputs, features)

    def _maps(
        self, batched_inputs: Sequence[dict], features: dict[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        teacher_pyramid = self.teacher(
            batched_inputs,
            input_format=self.input_format,
            device=self.device,
            **self.head.features,
        )
        return self.head.disparity_maps(features, teacher_pyramid, **image_area(batched_inputs))


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Within the context: eval mode, but batch norms use the batch's statistics and keep none."""
    modes = {module: module.training for module in model.modules()}
    # One that synchronises would wait for processes that draw no pictures.
    norms = [m for m in modes if isinstance(m, nn.BatchNorm2d)]
    norms = [m for m in norms if not isinstance(m, NaiveSyncBatchNorm)]
    tracking = [norm.track_running_stats for norm in norms]
    model.eval()
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, tracked in zip(norms, tracking, strict=True):
            norm.track_running_stats = tracked
        for module, training in modes.items():
            module.training = training


def labelled_boxes(batched_inputs: Sequence[dict]) -> list[Tensor] | None:
    """The labelled boxes of a batch, (M,4) XYXY pixels each, where they are; None if unlabelled."""
    if not all("instances" in item for item in batched_inputs):
        return None
    return [item["instances"].gt_boxes.tensor for item in batched_inputs]

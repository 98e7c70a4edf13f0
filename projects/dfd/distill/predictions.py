"""What the heads of student and teacher predict at each cell, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..errors import UserError
from ..losses.predictions import PredictionLoss, Predictions
from .head_outputs import head_of
from .pairing import LevelPair, pair_levels
from .real_pixels import Masks, RealPixels
from .same_cells import crop_to_images
from .strength import TimedHead


def _same_anchors(student: nn.Module, teacher: nn.Module) -> bool:
    """Whether two detectors have the same anchors on the strides that both have."""
    found = []
    for model in (student, teacher):
        owner = getattr(model, "proposal_generator", None) or model
        generator = getattr(owner, "anchor_generator", None)
        cells = [a.flatten().tolist() for a in getattr(generator, "cell_anchors", ())]
        found.append(dict(zip(getattr(generator, "strides", ()), cells, strict=False)))
    ours, theirs = found
    return all(theirs[stride] == anchors for stride, anchors in ours.items() if stride in theirs)


def _check_loss(loss: object) -> None:
    if not isinstance(loss, PredictionLoss):
        raise UserError(
            f"model.predictions.loss is a {type(loss).__name__}: derive it from "
            "dfd.losses.PredictionLoss"
        )
    if loss.state_dict():
        raise UserError(
            f"model.predictions.loss, a {type(loss).__name__}, has parameters or buffers, which no "
            "checkpoint would hold: it must have none"
        )


class PredictionHead(TimedHead):
    """Pairs the levels of two heads and applies losses to what they predict, beside the features'.

    Student and teacher must predict the same at a cell: heads of one kind, with as many anchors
    and the same classes in the same order.
    """

    def __init__(
        self,
        *,
        loss: PredictionLoss | Sequence[PredictionLoss],
        weight: float = 1.0,
        warmup_iters: int = 0,
        end_iter: int | None = None,
    ) -> None:
        """
        Args:
            loss: between the predictions; of several the sum.
            weight: multiplies it; >= 0; 0 switches it off.
            warmup_iters: the weight rises linearly over so many iterations.
            end_iter: it stops at this iteration; None: never.
        """
        super().__init__("model.predictions", weight, warmup_iters, end_iter)
        losses = [loss] if isinstance(loss, nn.Module) else list(loss)
        for one in losses:
            _check_loss(one)
        if not losses:
            raise UserError("model.predictions.loss is empty: name a loss, or set it to null")
        self.losses = nn.ModuleList(losses)
        self.pairs: list[LevelPair] = []

    def attach(
        self,
        student: nn.Module,
        teacher: nn.Module,
        teacher_scale: float = 1.0,
        same_classes: bool = True,
    ) -> None:
        """Pair the levels of the two heads by stride.

        Args:
            teacher_scale: sides of the teacher's images over those of the student's.
            same_classes: whether those of the two are known to be the same.

        Raises:
            UserError: one of them has no such head, they are of different kinds, share no stride,
                or see images of different sizes.
        """
        (ours, our_names), (theirs, their_names) = (
            head_of(student, "student"),
            head_of(teacher, "teacher"),
        )
        if type(ours) is not type(theirs):
            raise UserError(
                f"model.predictions: the student's head is a {type(ours).__name__}, the teacher's "
                f"a {type(theirs).__name__}: they predict different things; set it to null"
            )
        if not _same_anchors(student, teacher):
            raise UserError(
                "model.predictions: the teacher's logits are of other anchors than the student's "
                "(sizes or aspect ratios): set it to null"
            )
        if not same_classes and not hasattr(student, "proposal_generator"):
            raise UserError(
                "model.predictions: with model.teacher.check_classes=False the teacher's logits "
                "may be of other classes than the student's: set one of the two to its default"
            )
        if teacher_scale != 1:
            raise UserError(
                f"model.predictions: the teacher sees images {teacher_scale:g} times as large, "
                "whose cells are others: set it to null"
            )

        def shapes(model: nn.Module, names: Sequence[str]) -> dict[str, ShapeSpec]:
            return {name: model.backbone.output_shape()[name] for name in names}

        self.pairs = pair_levels(shapes(student, our_names), shapes(teacher, their_names))

    @property
    def needs_boxes(self) -> bool:
        """Whether a loss compares boxes, which are decoded only then."""
        return any(loss.needs_boxes for loss in self.losses)

    def forward(
        self,
        student: Mapping[str, Predictions],
        teacher: Mapping[str, Predictions],
        image_sizes: Sequence[tuple[int, int]],
        masks: Masks | None = None,
        iteration: int = 0,
    ) -> dict[str, Tensor]:
        """
        Args:
            student, teacher: level name to predictions, with boxes where ``needs_boxes``.
            image_sizes: (height, width) in pixels of each image before the batch is padded.
            masks: see ``DFDHead.forward``.
            iteration: counts from 0.

        Returns:
            ``{"loss_dfd_head_<level>": scalar}``.

        Raises:
            UserError: the two predict different numbers of logits.
        """
        device = next(iter(student.values())).logits.device
        pixels = RealPixels(image_sizes, masks, device)
        rows = []
        for pair in self.pairs:
            ours, theirs = student[pair.name], teacher[pair.teacher_name]
            s, t = ours.logits, theirs.logits
            if s.shape[1] != t.shape[1]:
                raise UserError(
                    f"model.predictions: the student has {s.shape[1]} logits a cell on {pair.name}"
                    f", the teacher {t.shape[1]}: anchors and classes of the two must be the same"
                )
            ours, theirs = _crop(ours, theirs, pixels.sizes, pair.stride)
            valid = pixels.cells(pair.stride, *ours.logits.shape[-2:])
            if valid is None:
                valid = torch.ones_like(ours.logits[:, 0], dtype=torch.bool)
            rows.append((ours, theirs, valid))
        student_levels, teacher_levels, valid_levels = zip(*rows, strict=True)
        with torch.autocast(device.type, enabled=False):
            of_losses = [loss(student_levels, teacher_levels, valid_levels) for loss in self.losses]
        factor = self.factor(iteration)
        return {
            f"loss_dfd_head_{pair.name}": factor * sum(of_level)
            for pair, *of_level in zip(self.pairs, *of_losses, strict=True)
        }


def _crop(
    student: Predictions, teacher: Predictions, sizes: Sequence[tuple[int, int]], stride: int
) -> tuple[Predictions, Predictions]:
    """Both on the cells that both have; the teacher's without a gradient."""
    pairs = [
        (None, None) if s is None or t is None else crop_to_images(s, t.detach(), sizes, stride)
        for s, t in zip(student, teacher, strict=True)
    ]
    ours, theirs = zip(*pairs, strict=True)
    return Predictions(*ours), Predictions(*theirs)

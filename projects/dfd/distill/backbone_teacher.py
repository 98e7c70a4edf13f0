"""A frozen backbone as teacher: a foundation model's features, with no detector on top.

Shape shorthand: N images, C channels, H x W cells of one level.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..errors import UserError
from ..weights.files import state_sha256
from ..weights.strict import WeightFile
from .teacher import FrozenTeacher

logger = logging.getLogger(__name__)


class _BareBackbone(nn.Module):
    """A backbone with what a detector does to its images."""

    def __init__(
        self,
        backbone: Backbone,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.input_format = input_format
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(list(values)).view(-1, 1, 1), persistent=False)

    def preprocess_image(self, batched_inputs: Sequence[dict[str, Tensor]]) -> ImageList:
        images = [item["image"].to(self.pixel_mean.device) for item in batched_inputs]
        return ImageList.from_tensors(
            [(image - self.pixel_mean) / self.pixel_std for image in images],
            self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )


class FrozenBackbone(FrozenTeacher):
    """A backbone whose features the student is to learn: DINOv2, DINOv3, any other of timm.

    Its levels are paired by stride, which is by grid: with the student's pyramid, or, under
    ``model.head.trunk=True``, with the student's trunk (the tokens of a ViT, the stages of a CNN).
    It has no classes, detects nothing and scores no cells.
    """

    detects = False

    def __init__(
        self,
        *,
        backbone: Backbone,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
        allow_random: bool = False,
        precision: str = "auto",
        store: str | None = None,
        store_gib: float = 20.0,
    ) -> None:
        """
        Args:
            backbone: such as ``modeling.TimmViT`` or ``TimmPyramid`` with ``pretrained`` weights.
            pixel_mean, pixel_std: on [0, 255], in the order of ``input_format``; in a config
                "auto", as the timm model wants them.
            input_format: "BGR" or "RGB"; in a config "auto".
            allow_random: take one without weights, for tests and benchmarks.
            precision, store, store_gib: as ``FrozenTeacher``'s.

        Raises:
            UserError: it has no weights, or a setting is outside its range.
        """
        model = _BareBackbone(backbone, pixel_mean, pixel_std, input_format)
        super().__init__(
            model=model,
            allow_random=allow_random,
            precision=precision,
            check_classes=False,
            store=store,
            store_gib=store_gib,
        )

    def _load(self, checkpoint: str | None, allow_random: bool) -> None:
        backbone = self.model.backbone
        source = getattr(backbone, "pretrained", False)
        if not source and not allow_random:
            raise UserError(
                "model.teacher.backbone has random weights, which teach nothing: set its "
                "pretrained to True or a file (one of your own that loads its weights by itself "
                "says so by an attribute pretrained; model.teacher.allow_random=True permits "
                "random ones)"
            )
        if not source:
            logger.warning("Teacher: RANDOM WEIGHTS, as model.teacher.allow_random=True permits")
            return
        named = getattr(backbone, "model_name", None)
        path = f"timm's {named}" if named else f"a {type(backbone).__name__}'s own"
        path = source if isinstance(source, str) else path
        # Of the tensors, for weights by name are in no file that could be compared.
        self.weights = WeightFile(path, state_sha256(backbone.state_dict()), {}, None)
        logger.info("Teacher: %s, sha256 of its weights %s", path, self.weights.sha256[:16])

    @property
    def kind(self) -> str:
        backbone = self.model.backbone
        return f"{type(backbone).__name__} {getattr(backbone, 'model_name', '')}".rstrip()

    def output_shapes(self, **what: bool) -> list[dict[str, ShapeSpec]]:
        """Of its levels, which stand beside the student's pyramid, or its trunk if so asked."""
        shapes = dict(self.model.backbone.output_shape())
        return [{}, shapes] if what.get("trunk") else [shapes]

    def __call__(self, *args: Any, trunk: bool = False, **kwargs: Any) -> dict[str, Tensor]:
        """As ``FrozenTeacher``'s; its features are the same beside either."""
        return super().__call__(*args, **kwargs)

    def detect(self, *args: Any, **kwargs: Any) -> list[dict]:
        """
        Raises:
            UserError: always.
        """
        raise UserError(
            "the teacher is a backbone, which detects nothing: leave out --eval-teacher, "
            "train.eval_teacher_first and train.min_teacher_ap (dfd benchmark: --no-teacher)"
        )

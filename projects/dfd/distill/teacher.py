"""The frozen teacher: strict weights, its own preprocessing, its own precision."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..errors import UserError
from ..losses.predictions import Predictions
from ..ranges import check_choice, check_positive
from ..weights.strict import WeightFile, load_strict, read_weights
from .contract import (
    channel_order,
    check_fits_square_padding,
    check_not_resized,
    feature_modules,
    feature_part,
    run_features,
)
from .head_outputs import read_head, run_head
from .objectness import object_scores, scored_levels
from .passes import StoredPasses
from .precision import PRECISIONS, faster_copy, resolve_precision

logger = logging.getLogger(__name__)


class FrozenTeacher:
    """A detector whose pyramid the student is to learn.

    Deliberately no ``nn.Module``: as a plain attribute of the distilling detector it is in no
    ``state_dict()``, in no ``parameters()``, not wrapped by DistributedDataParallel, and no call of
    ``train()`` reaches it.
    """

    # Whether it has classes and finds objects.
    detects = True

    def __init__(
        self,
        *,
        model: nn.Module,
        checkpoint: str | None = "",
        allow_random: bool = False,
        precision: str = "auto",
        input_format: str | None = None,
        scale: float = 1.0,
        class_names: Sequence[str] | None = None,
        check_classes: bool = True,
        store: str | None = None,
        store_gib: float = 20.0,
    ) -> None:
        """
        Args:
            model: any Detectron2 detector with a ``backbone`` and a ``preprocess_image``.
            checkpoint: path or URL of its weights: a Detectron2 zoo ``.pkl``, a ``.pth``, or a
                checkpoint that this project wrote. Every key must fit.
            allow_random: take a teacher without weights, for tests and benchmarks.
            precision: of the teacher's pass: "fp32", "bf16", "fp16" (CUDA only), "int8" (of its
                convolutions, on an x86 CPU; see ``int8``), or "auto": bf16 where the device has
                units for it, else fp32. Never fp16, in which a feature above 65504, as ViTs have
                some, is inf.
            input_format: "BGR" or "RGB", the channel order that the teacher was trained with; None
                to take the model's own ``input_format`` (BGR where it has none).
            scale: sides of its images over those of the student's. Other than 1, it is given
                ``teacher_image`` of each item, which ``data.TwoSizeMapper`` makes.
            class_names: the teacher's classes in order, where the checkpoint does not hold them
                (those of this project do). They are compared with the data's.
            check_classes: whether the teacher's classes must be those of the data. Features can
                be learnt from a teacher of other classes, but seldom are meant to be.
            store: a folder in which the features of each image are kept, and from which this and
                other runs take them. None: the teacher runs on every image.
            store_gib: the limit of that folder, in GiB; what was used least recently goes first.

        Raises:
            UserError: no checkpoint, one that does not fit, or a setting outside its range.
        """
        check_choice("model.teacher.precision", precision, ("auto", *PRECISIONS))
        for attribute in ("backbone", "preprocess_image"):
            if not hasattr(model, attribute):
                raise UserError(
                    f"model.teacher.model is a {type(model).__name__} without a {attribute}: the "
                    "teacher must be a Detectron2 detector"
                )
        self.scale = check_positive("model.teacher.scale", scale)
        self.model = model.eval().requires_grad_(False)
        self.precision = precision
        self.weights: WeightFile | None = None
        self.check_classes = check_classes
        self.class_names = None if class_names is None else list(class_names)
        self._store = None if store is None else StoredPasses(store, store_gib)
        self.input_format = channel_order(model, input_format, "teacher")
        self._load(checkpoint, allow_random)
        # What a pass runs, on its device.
        self._part: nn.Module | None = None
        self._modules: list[nn.Module] = []
        self._device: torch.device | None = None
        self._dtype = torch.float32
        self._faster = False
        # Whether the whole detector, of which a pass needs the backbone alone, is on the device.
        self._whole = False

    def _load(self, checkpoint: str | None, allow_random: bool) -> None:
        """Read the weights of ``model``, and note where they came from."""
        if checkpoint:
            weights = read_weights(checkpoint, "model.teacher.checkpoint")
            load_strict(
                self.model,
                weights,
                "model.teacher.checkpoint",
                input_format=self.input_format,
            )
            names = weights.class_names and list(weights.class_names)
            if self.class_names and names and self.class_names != names:
                raise UserError(
                    f"model.teacher.class_names is {self.class_names}, but {weights.path} holds "
                    f"{names}: leave class_names out"
                )
            self.class_names = self.class_names or weights.class_names
            # The tensors are in the model now; what remains is where they came from.
            self.weights = dataclasses.replace(weights, model={})
            logger.info("Teacher: %s, sha256 %s", weights.path, weights.sha256[:16])
        elif not allow_random:
            raise UserError(
                "model.teacher.checkpoint is empty: name the teacher's weights (a random teacher "
                "teaches nothing; model.teacher.allow_random=True permits one)"
            )
        else:
            logger.warning("Teacher: RANDOM WEIGHTS, as model.teacher.allow_random=True permits")

    def output_shapes(self, **what: bool) -> list[dict[str, ShapeSpec]]:
        """Channels and stride of each level of its pyramid, then of its trunk where that is asked.

        Args:
            what: ``trunk`` and ``stems``, see ``contract.feature_modules``.
        """
        modules = feature_modules(self.model, "teacher", **what)
        return [dict(module.output_shape()) for module in modules]

    @property
    def kind(self) -> str:
        """What it is, in words."""
        return type(self.model).__name__

    @property
    def device(self) -> torch.device:
        return self.model.pixel_mean.device

    def own_images(
        self, batched_inputs: Sequence[dict[str, Tensor]], input_format: str
    ) -> list[dict[str, Tensor]]:
        """The batch with the images that the teacher is to see: its size, its channel order.

        Raises:
            UserError: an item has no image of its size.
        """
        key = "image" if self.scale == 1 else "teacher_image"
        turn = input_format != self.input_format
        items = []
        for item in batched_inputs:
            self._check_size(item)
            image = item[key].flip(0) if turn else item[key]
            items.append({**item, "image": image})
        return items

    def _check_size(self, item: dict[str, Tensor]) -> None:
        size, given = item["image"].shape[-2:], item.get("teacher_image")
        if self.scale == 1 and given is None:
            return
        where = item.get("file_name", "no file name")
        if given is None:
            raise UserError(
                f"model.teacher.scale is {self.scale:g}, but there is no teacher_image ({where}): "
                "make both sizes with dfd.data.TwoSizeMapper as dataloader.train.mapper and .test"
            )
        # The smaller of the two was rounded to whole pixels.
        unit = max(1.0, self.scale)
        wrong = [
            abs(g - self.scale * s) > unit for g, s in zip(given.shape[-2:], size, strict=True)
        ]
        if any(wrong):
            raise UserError(
                f"model.teacher.scale is {self.scale:g}, but the teacher's image is of "
                f"{given.shape[-2]} x {given.shape[-1]} pixels where the student's is of "
                f"{size[0]} x {size[1]} ({where}): set teacher_scale of the mappers to the same"
            )

    def network_input(self, items: Sequence[dict[str, Tensor]]) -> Tensor:
        """(N,3,height,width) of ``own_images``, which has turned the channels.

        Then come the teacher's own mean and standard deviation, and its own padding: both are the
        model's own ``preprocess_image``.
        """
        check_fits_square_padding(self.model, items, "teacher")
        images = self.model.preprocess_image([{"image": item["image"]} for item in items])
        check_not_resized(self.model, items, images, "teacher")
        return images.tensor

    @torch.no_grad()
    def __call__(
        self,
        batched_inputs: Sequence[dict[str, Tensor]],
        *,
        input_format: str,
        device: torch.device | str | None = None,
        **what: bool,
    ) -> dict[str, Tensor]:
        """The teacher's pyramid of a batch, without gradients. No more of it runs than that needs.

        Args:
            batched_inputs: Detectron2's; ``image`` is (3,H,W) in ``input_format`` order, [0, 255].
            device: where to run; None for where the teacher is.
            what: ``trunk`` and ``stems``, see ``contract.feature_modules``.

        Returns:
            Level name to (N,C,H,W), in the precision of the pass.
        """
        device = torch.device(device or self.device)
        if self._part is None or device != self._device:
            self._make_part(device)
        elif self._whole:
            self._settle()
        # Nothing here calls train(), but a user's hook may. Looking costs a hundredth of eval().
        if any(module.training for module in self._modules):
            self._part.eval()
        items = self.own_images(batched_inputs, input_format)
        images = self.network_input(items)
        if self._store is None:
            return self._run(images, **what)
        shown = [item["image"] for item in items]
        # What windows, positions or pooling do to a grid shows at that grid alone.
        size = tuple(images.shape[-2:])
        variant = (str(device), self._dtype, size, *sorted(what.items()))
        return self._store(
            shown, images, lambda x: self._run(x, **what), lambda: self._probe(size), variant
        )

    def _run(self, images: Tensor, **what: bool) -> dict[str, Tensor]:
        low = self._dtype in (torch.bfloat16, torch.float16)
        if self._faster:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, dtype=self._dtype, enabled=low):
            return run_features(self._part, images, "teacher", **what)

    def _probe(self, size: tuple[int, int]) -> Tensor:
        """The network's input of an image of that size that is the same for every teacher."""
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        return self.network_input([{"image": image}])

    @torch.no_grad()
    def detect(
        self,
        batched_inputs: Sequence[dict[str, Tensor]],
        *,
        input_format: str,
        device: torch.device | str | None = None,
    ) -> list[dict]:
        """The whole teacher's detections, as Detectron2's detectors give them; always in fp32.

        Args:
            batched_inputs: as for a pass, with the ``height`` and ``width`` that are wanted.
            input_format: the channel order of ``image``; the teacher gets its own.
            device: where to run; None for where the teacher is.
        """
        batched_inputs = self.own_images(batched_inputs, input_format)
        check_fits_square_padding(self.model, batched_inputs, "teacher")
        self.model.to(device or self.device).eval()
        self._whole = True
        with torch.autocast(self.device.type, enabled=False):
            return self.model(batched_inputs)

    def check_objectness(self, levels: Sequence[str]) -> None:
        """
        Raises:
            UserError: the teacher does not score the cells of each of these levels.
        """
        scored = scored_levels(self.model)
        missing = [level for level in levels if level not in scored]
        if missing:
            raise UserError(
                "the criterion needs the teacher's objectness, but the teacher, a "
                f"{type(self.model).__name__}, scores no cells of {', '.join(missing)}: take "
                "another criterion or set model.head.levels"
            )

    def objectness(self, pyramid: dict[str, Tensor], **what: bool) -> dict[str, Tensor]:
        """How sure the teacher is of an object at each cell of the levels that it scores.

        Args:
            pyramid: what a pass gave with the same ``what``.

        Returns:
            Level name to (N,H,W) fp32, see ``objectness.object_scores``.
        """
        return object_scores(self.model, pyramid, stems=what.get("stems", False))

    @torch.no_grad()
    def predictions(
        self, pyramid: dict[str, Tensor], *, boxes: bool = False, **what: bool
    ) -> dict[str, Predictions]:
        """What its head predicts, in fp32.

        Args:
            pyramid: what a pass gave with the same ``what``.
            boxes: whether to decode boxes too.

        Returns:
            By level, see ``head_outputs.read_head``.
        """
        output = run_head(self.model, pyramid, stems=what.get("stems", False))
        return read_head(self.model, output, boxes=boxes)

    def _make_part(self, device: torch.device) -> None:
        """What passes on this device run, and everything else where it costs no memory there."""
        dtype = resolve_precision(self.precision, device)
        self._device, self._dtype = device, dtype
        logger.info("Teacher's pass: %s on %s", str(dtype).removeprefix("torch."), device)
        self._part = feature_part(self.model)
        # On CUDA fp32 gains nothing that is known, and a copy costs memory there.
        self._faster = dtype != torch.float32 or device.type == "cpu"
        if self._faster:
            self._part = faster_copy(self._part, dtype).to(device)
        self._settle()
        self._modules = list(self._part.modules())

    def _settle(self) -> None:
        """Leave on the device what a pass needs alone: not the heads, nor weights that it has in
        lower precision. They are needed for detections, and compared when a run starts."""
        if self._device.type != "cpu":
            self.model.to("cpu")
        self._part.to(self._device)
        for name, buffer in self.model.named_buffers(recurse=False):  # Mean and deviation.
            setattr(self.model, name, buffer.to(self._device))
        self._whole = False

"""The distillation head: two pyramids in, named and weighted losses out.

Shape shorthand: N images, C channels, H x W cells of one level.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..errors import UserError
from ..losses.base import FeatureCriterion, LevelFeatures, check_criterion
from ..ranges import check_choice, check_count, check_number, is_number
from .adapters import make_adapter
from .contract import Split
from .disparity import disparity_map, scale_and_measure, scale_features
from .gradient_share import make_gradient_share
from .pairing import LevelPair, pair_detectors
from .real_pixels import Masks, RealPixels, to_device
from .same_cells import PixelsOfBoth, level_features, pool_level
from .strength import TimedHead

ALIGN = ("stride", "resize")
LEVEL_WEIGHTS = ("equal", "cells")
POOLED = ("both", "teacher")


def _checked_loss(
    criterion: nn.Module, loss: object, level: LevelFeatures, thorough: bool
) -> Tensor:
    """
    Args:
        thorough: a criterion with parameters of its own is asked for the student's gradient, at the
            cost of a backward pass through it.

    Raises:
        UserError: it is no scalar, or no gradient leads from it to the student.
    """
    name = f"model.head.criterion, a {type(criterion).__name__},"
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(f"{name} returns {what}: it must return a tensor of one number, shape ()")
    leads = loss.requires_grad
    own = any(parameter.requires_grad for parameter in criterion.parameters())
    if thorough and leads and own and level.student.requires_grad:
        # What checkpoints by re-entering cannot be asked.
        with contextlib.suppress(RuntimeError):
            (found,) = torch.autograd.grad(
                loss, level.student, retain_graph=True, allow_unused=True
            )
            leads = found is not None
    # Of images that show nothing it may be a constant 0.
    if level.student.requires_grad and not leads and loss != 0:
        raise UserError(
            f"{name} returns a loss without a gradient, so the student would learn nothing from "
            "it: compute it from level.student without detach() and no_grad() (one that is to "
            "begin later: take model.head.warmup_iters)"
        )
    return loss


def _checked_stats(criterion: nn.Module, level: str, device: torch.device) -> dict[str, Tensor]:
    """What a criterion has to log, as tensors of one number.

    Raises:
        UserError: something of it is none.
    """
    stats = {}
    for key, value in criterion.stats.items():
        value = torch.as_tensor(value, device=device) if is_number(value) else value
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"stats[{key!r}] of model.head.criterion, a {type(criterion).__name__}, is {what}: "
                "it must be one number"
            )
        stats[f"dfd/{level}/{key}"] = value.detach().reshape(())
    return stats


class DFDHead(TimedHead):
    """Pairs the levels of student and teacher, applies one criterion to each, weighs and names.

    Any :class:`~dfd.losses.FeatureCriterion` serves; a run with another criterion differs from a
    DFD run by that alone. Its parameters (adapters, and those of the criterion, one copy a level)
    are trained with the student and are not part of it.
    """

    def __init__(
        self,
        *,
        criterion: FeatureCriterion,
        weight: float = 1.0,
        levels: Sequence[str] | None = None,
        level_weights: str | Mapping[str, float] = "cells",
        adapter: str | Callable[[int, int], nn.Module] = "auto",
        trunk: bool = False,
        stems: bool = False,
        align: str = "stride",
        pool: int | None = None,
        pooled: str = "both",
        warmup_iters: int = 0,
        end_iter: int | None = None,
        gradient_share: float | None = 1.0,
        gradient_share_mode: str = "cap",
        gradient_share_over: str = "all",
        drop_conflict: bool = False,
    ) -> None:
        """
        Args:
            criterion: applied to each level; copied, so that each level has parameters of its own.
            weight: multiplies the criterion's own weight; >= 0. 0 switches distillation off: the
                teacher is not run.
            levels: the student's names of the levels to distil; None for every shared stride.
            level_weights: "equal" (1 each: the sum over levels, as most published losses have
                it), "cells" (proportional to the level's number of valid cells), or a weight per
                level by the student's name. The first two average to 1 over the levels.
            adapter: from the student's channels to the teacher's; see ``adapters.make_adapter``.
            trunk: distil, beside the pyramids, what they are made from: the last block's tokens
                of a ViT as a map, the stages of a CNN. Pairs are by stride, which is by grid.
            stems: distil a YOLOX's levels after the stems of its head, as FGD did, and not the
                pyramid that these are given; nothing changes for a detector without stems.
            align: where the teacher's images are larger or smaller (``FrozenTeacher.scale``):
                "stride": levels whose cells cover the same part of the image make a pair, so that
                nothing is resampled; "resize": levels of equal stride do, and the teacher's map is
                resampled to the student's grid.
            pool: average the levels that are finer over blocks of so many pixels, such as the
                patches of a ViT student, which has no detail of its own below them; None: do not.
            pooled: "both": the criterion sees both sides at that grid, so what is finer is free;
                "teacher": the teacher alone, spread again over the student's cells, so that the
                student is to be smooth there.
            warmup_iters: the weight rises linearly over so many iterations.
            end_iter: distillation stops at this iteration; None: never.
            gradient_share, gradient_share_mode, gradient_share_over, drop_conflict: how strong the
                head's gradient at the features may be beside the labels', see
                :class:`~dfd.distill.gradient_share.GradientShare`; the share rises with the
                warm-up. None: as strong as the loss makes it.
        """
        super().__init__("model.head", weight, warmup_iters, end_iter)
        check_criterion(criterion)
        if isinstance(levels, str):
            raise UserError(f"model.head.levels is {levels!r}; it must be a list: [{levels}]")
        if level_weights not in LEVEL_WEIGHTS and not isinstance(level_weights, Mapping):
            raise UserError(
                f"DFDHead(level_weights={level_weights!r}): it must be one of "
                f"{', '.join(LEVEL_WEIGHTS)}, or a weight per level"
            )
        for name, value in level_weights.items() if isinstance(level_weights, Mapping) else ():
            check_number(f"model.head.level_weights.{name}", value)
        check_choice("model.head.align", align, ALIGN)
        check_choice("model.head.pooled", pooled, POOLED)
        if pool is not None:
            check_count("model.head.pool", pool, 1)
        elif pooled != "both":
            raise UserError(f"model.head.pooled is {pooled!r}, but pool is null: give it a number")
        self.pool = pool
        self.pooled = pooled
        # What is tapped, see contract.feature_modules.
        self.features = {"trunk": trunk, "stems": stems}
        self.align = align
        self._resample = self._teacher_scale = 1.0
        self.levels = None if levels is None else list(levels)
        self.level_weights = level_weights
        self.adapter = adapter
        self.gradient_share = make_gradient_share(
            gradient_share, gradient_share_mode, gradient_share_over, drop_conflict
        )
        # In a tuple, so that the pattern from which the copies are made is no submodule.
        self._criterion = (criterion,)
        self.pairs: list[LevelPair] = []
        self.adapters = nn.ModuleDict()
        self.criteria = nn.ModuleDict()
        self.stats: dict[str, Tensor] = {}
        # Whether a first forward has shown that each level's loss leads to the student.
        self._checked = False

    @property
    def needs_objectness(self) -> bool:
        """Whether the criterion asks for the teacher's objectness."""
        return self._criterion[0].needs_objectness

    def attach(
        self,
        student_shapes: Mapping[str, ShapeSpec],
        teacher_shapes: Mapping[str, ShapeSpec],
        student_trunk: Mapping[str, ShapeSpec] | None = None,
        teacher_trunk: Mapping[str, ShapeSpec] | None = None,
        teacher_scale: float = 1.0,
    ) -> None:
        """Pair the levels and make the parameters. Called once, before the optimizer is built.

        Args:
            student_shapes, teacher_shapes: of the pyramids.
            student_trunk, teacher_trunk: of the trunks, where ``trunk`` is set.
            teacher_scale: sides of the teacher's images over those of the student's.
        """
        if self.pairs:
            raise RuntimeError("this DFDHead is attached already; a head serves one detector")
        by_stride = self.align == "stride"
        ratio, self._resample = (teacher_scale, 1.0) if by_stride else (1.0, teacher_scale)
        self._teacher_scale = teacher_scale
        shapes = student_shapes, teacher_shapes, student_trunk or {}, teacher_trunk or {}
        self.pairs = pair_detectors(*shapes, self.levels, ratio)
        self._check_levels()
        for pair in self.pairs:
            self.adapters[pair.name] = make_adapter(
                self.adapter, pair.student_channels, pair.teacher_channels
            )
            criterion = copy.deepcopy(self._criterion[0])
            criterion.set_channels(pair.teacher_channels)
            self.criteria[pair.name] = criterion

    def _check_levels(self) -> None:
        """
        Raises:
            UserError: the settings of levels do not fit the levels that there are.
        """
        if not isinstance(self.level_weights, str):
            names = {pair.name for pair in self.pairs}
            if set(self.level_weights) != names:
                raise UserError(
                    f"model.head.level_weights names {sorted(self.level_weights)}, but the levels "
                    f"are {sorted(names)}: give each of them a weight"
                )
        if self.pool is None:
            return
        strides = [pair.stride for pair in self.pairs]
        finer = [stride for stride in strides if stride < self.pool]
        if not finer or any(self.pool % stride for stride in finer):
            raise UserError(
                f"model.head.pool is {self.pool}; it must be a multiple of the strides below it, "
                f"and above the finest, {min(strides)}; or None"
            )

    def split(self, iteration: int, unlabelled: dict[str, Tensor] | None = None) -> Split | None:
        """What parts the student's features for the head, see ``contract.tap``; None: nothing.

        Args:
            unlabelled: the student's features of images without labels, which are changed to those
                that the head is to have.
        """
        if self.gradient_share is None:
            return None
        return functools.partial(
            self.gradient_share.split,
            warmup=self._warmup(iteration),
            unlabelled=unlabelled,
            levels={pair.name for pair in self.pairs},
        )

    def idle_losses(self) -> dict[str, Tensor]:
        """Zero, but connected to every parameter: DistributedDataParallel waits for each."""
        parameters = list(self.parameters())
        if not parameters:
            return {}
        return {"loss_dfd_idle": 0.0 * sum(p.sum() for p in parameters)}

    def _pixels(
        self,
        image_sizes: Sequence[tuple[int, int]],
        masks: Masks | None,
        teacher_masks: Masks | None,
        device: torch.device,
    ) -> PixelsOfBoth:
        own = RealPixels(image_sizes, masks, device)
        if self._teacher_scale == 1:
            return PixelsOfBoth(own, own)
        of_teacher = own.resized(self._teacher_scale, teacher_masks)
        return PixelsOfBoth(own, of_teacher, self._resample)

    def _wanted_boxes(
        self, boxes: Sequence[Tensor] | None, device: torch.device
    ) -> Sequence[Tensor] | None:
        """The boxes on the device, copied in one go; those that nothing looks at stay."""
        wanted = self._criterion[0].needs_boxes
        if not wanted or not boxes or all(b.device == device for b in boxes):
            return boxes
        return to_device(torch.cat(list(boxes)), device).split([len(b) for b in boxes])

    def forward(
        self,
        student_pyramid: Mapping[str, Tensor],
        teacher_pyramid: Mapping[str, Tensor],
        image_sizes: Sequence[tuple[int, int]],
        boxes: Sequence[Tensor] | None = None,
        iteration: int = 0,
        max_iter: int | None = None,
        objectness: Mapping[str, Tensor] | None = None,
        masks: Masks | None = None,
        teacher_masks: Masks | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            student_pyramid, teacher_pyramid: level name to (N,C,H,W), in any float precision.
            image_sizes: (height, width) in pixels of each image before the batch is padded.
            boxes: N tensors (M,4), labelled boxes as XYXY in pixels of the input; or None. On any
                device: they are copied only if the criterion wants them.
            iteration: counts from 0; decides warm-up and end, and what the criterion anneals.
            max_iter: of the training; None where it is not known.
            objectness: the teacher's level name to (N,H,W), from 0 to 1, where
                ``needs_objectness``.
            masks: of each image (height, width) bool, False where an augmentation filled it up;
                None where nothing was. Such pixels are padding too.
            teacher_masks: the same of the teacher's images, where these are of another size; None
                to take ``masks``, resized.

        Returns:
            ``{"loss_dfd_<level>": scalar}``. Also leaves detached scalars in ``stats``, keyed
            ``dfd/<level>/<what>``.
        """
        losses, stats, cells = {}, {}, {}
        device = next(iter(student_pyramid.values())).device
        pixels = self._pixels(image_sizes, masks, teacher_masks, device)
        boxes = self._wanted_boxes(boxes, device)
        objectness = objectness if self.needs_objectness else None
        for pair in self.pairs:
            level = level_features(
                pair,
                student_pyramid[pair.name],
                teacher_pyramid[pair.teacher_name],
                pixels,
                self.adapters[pair.name],
                objectness[pair.teacher_name] if objectness is not None else None,
                boxes=boxes,
                iteration=iteration,
                max_iter=max_iter,
            )
            criterion = self.criteria[pair.name]
            # Squares and their sums overflow fp16 and lose digits in bf16.
            with torch.autocast(device.type, enabled=False):
                if self.pool is not None:
                    level = pool_level(level, self.pool, both=self.pooled == "both")
                losses[pair.name] = _checked_loss(
                    criterion, criterion(level), level, thorough=not self._checked
                )
            valid = level.valid
            cells[pair.name] = level.student[:, 0].numel() if valid is None else valid.sum()
            stats |= _checked_stats(criterion, pair.name, device)
        self._checked = True
        factor = self.factor(iteration)
        weights = self._resolve_level_weights(cells)
        self.stats = stats
        return {
            f"loss_dfd_{name}": loss * (factor * weights[name]) for name, loss in losses.items()
        }

    def _resolve_level_weights(
        self, cells: Mapping[str, Tensor | int]
    ) -> Mapping[str, Tensor | float]:
        if not isinstance(self.level_weights, str):
            return self.level_weights
        if self.level_weights == "equal":
            return dict.fromkeys(cells, 1.0)
        total = sum(cells.values())
        # A batch of mosaics, say, may show nothing real that fills a cell.
        total = total.clamp(min=1) if isinstance(total, Tensor) else total
        return {name: len(cells) * count / total for name, count in cells.items()}

    @torch.no_grad()
    def disparity_maps(
        self,
        student_pyramid: Mapping[str, Tensor],
        teacher_pyramid: Mapping[str, Tensor],
        image_sizes: Sequence[tuple[int, int]],
        masks: Masks | None = None,
        teacher_masks: Masks | None = None,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The disparity of each level, for pictures and analysis. Arguments as of a forward.

        By the criterion's scale and measure; "level" and "squared" if it has none. Returns level
        name to ((N,H,W) disparity, (N,H,W) bool valid); no cell is valid where there is no telling.
        """
        maps = {}
        device = next(iter(student_pyramid.values())).device
        pixels = self._pixels(image_sizes, masks, teacher_masks, device)
        for pair in self.pairs:
            maps_of_both = student_pyramid[pair.name], teacher_pyramid[pair.teacher_name]
            level = level_features(pair, *maps_of_both, pixels, self.adapters[pair.name])
            criterion, valid = self.criteria[pair.name], level.valid
            scale, measure = scale_and_measure(criterion)
            s, t = scale_features(level.student, level.teacher, valid, scale)
            disparity = disparity_map(s, t, measure)
            if valid is None:
                valid = torch.ones_like(disparity, dtype=torch.bool)
            if scale == "channel" and valid.sum() < 2:
                valid = torch.zeros_like(valid)  # One value, standardised by itself, is always 0.
            maps[pair.name] = (disparity, valid)
        return maps

"""What this project asks of a Detectron2 detector, in one place."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..errors import UserError
from ..ranges import check_choice

Split = Callable[[Mapping[str, Tensor]], tuple[dict[str, Tensor], dict[str, Tensor]]]

CHANNEL_ORDERS = ("BGR", "RGB")
# Of an item of a batch that has no labels: it is only distilled.
UNLABELLED = "unlabelled"
# ImageNet's mean and standard deviation in RGB order, on [0, 255].
_IMAGENET_RGB = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])


def num_classes(model: nn.Module) -> int | None:
    """The number of object classes of a detector, None if it does not say."""
    for owner in (getattr(model, "roi_heads", None), model, getattr(model, "head", None)):
        value = getattr(owner, "num_classes", None)
        if isinstance(value, int):
            return value
    return None


def channel_order(model: nn.Module, given: str | None, who: str) -> str:
    """The channel order in which a detector wants its images.

    Args:
        given: "BGR" or "RGB" if the config says so; None to take the model's ``input_format``, and
            Detectron2's default of BGR where the model has none.
        who: "student" or "teacher", for the message.

    Raises:
        UserError: the order is neither, or the model's pixel mean or standard deviation are
            ImageNet's in the other order.
    """
    order = given or getattr(model, "input_format", None) or "BGR"
    check_choice(f"the {who}'s input_format", order, CHANNEL_ORDERS)
    for key, rgb in zip(("pixel_mean", "pixel_std"), _IMAGENET_RGB, strict=True):
        values = getattr(model, key, None)
        if values is None or values.numel() != 3:
            continue
        other_way_round = torch.tensor(rgb if order == "BGR" else rgb[::-1])
        for scale in (1.0, 255.0):
            if torch.allclose(values.detach().flatten().cpu() * scale, other_way_round, rtol=1e-3):
                other = CHANNEL_ORDERS[1 - CHANNEL_ORDERS.index(order)]
                raise UserError(
                    f"the {who} takes {order} images, but its {key} "
                    f"{[round(v, 3) for v in values.flatten().tolist()]} is ImageNet's in {other} "
                    f"order: set its input_format to {other} or turn {key} round"
                )
    return order


def trunk_of(backbone: nn.Module, who: str) -> nn.Module:
    """What a backbone makes its pyramid from: of a SimpleFeaturePyramid its ViT, of an FPN its CNN.

    Raises:
        UserError: the backbone is of another kind.
    """
    for name in ("net", "bottom_up"):
        trunk = getattr(backbone, name, None)
        if isinstance(trunk, nn.Module) and hasattr(trunk, "output_shape"):
            return trunk
    raise UserError(
        f"model.head.trunk is True, but the {who}'s backbone, a {type(backbone).__name__}, has no "
        "trunk (net or bottom_up) under a pyramid: set it to False"
    )


def stems_of(model: nn.Module) -> nn.Module | None:
    """What a detector's head makes of each level before its branches part, if it has such: YOLOX's.

    It maps the pyramid to levels of the same names, and has an ``output_shape`` as backbones have.
    """
    stems = getattr(getattr(model, "head", None), "stems", None)
    return stems if hasattr(stems, "output_shape") else None


def feature_modules(
    model: nn.Module, who: str, *, trunk: bool = False, stems: bool = False
) -> list[nn.Module]:
    """Which modules put out what is distilled: the pyramid's first, then its trunk.

    Args:
        model: a detector, or a ``feature_part`` of one.
        who: "student" or "teacher", for the message.
        trunk: what the pyramid is made from too.
        stems: the pyramid as the stems of the head put it out, where there are stems.

    Raises:
        UserError: the trunk is asked for, and there is none.
    """
    last = stems_of(model) if stems else None
    modules = [model.backbone if last is None else last]
    return [*modules, trunk_of(model.backbone, who)] if trunk else modules


def feature_part(model: nn.Module) -> nn.Module:
    """What of a detector its features need, under the names that it has there."""
    part = nn.Module()
    part.backbone = model.backbone
    if stems_of(model) is not None:
        part.head = nn.Module()
        part.head.stems = stems_of(model)
    return part


def run_features(
    model: nn.Module, images: Tensor, who: str, *, trunk: bool = False, stems: bool = False
) -> dict[str, Tensor]:
    """The features of preprocessed images (N,3,H,W), and nothing of a detector beyond them."""
    with tap(feature_modules(model, who, trunk=trunk, stems=stems)) as features:
        pyramid = model.backbone(images)
        if stems and stems_of(model) is not None:
            stems_of(model)(pyramid)
    return features


@contextlib.contextmanager
def tap(
    modules: Sequence[nn.Module], split: Split | None = None, wanted: Sequence[str] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Within the context, the named features that each of these modules puts out are left here.

    Args:
        split: makes of a module's features those that the detector goes on with, and those that
            are left here.
        wanted: those that must be as they are declared, of all modules together; None: all.

    Raises:
        UserError: one of them did not run exactly once, put out something else than its
            ``output_shape()`` says, or had its features changed by what came after it.
    """
    features: dict[str, Tensor] = {}
    calls = dict.fromkeys(modules, 0)
    versions: dict[str, int] = {}

    def keep(module: nn.Module, args: tuple, output: dict[str, Tensor]) -> dict[str, Tensor] | None:
        calls[module] += 1
        _check_features(module, args, output, wanted)
        passed, kept = (None, output) if split is None else split(output)
        features.update(kept)
        versions.update(
            {
                name: _version(feature)
                for name, feature in kept.items()
                if isinstance(feature, Tensor) and (wanted is None or name in wanted)
            }
        )
        return passed

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
    for module, count in calls.items():
        if count != 1:
            raise UserError(
                f"{type(module).__name__} ran {count} times in one forward; distillation needs its "
                "features exactly once (called as backbone(x), not as backbone.forward(x))"
            )
    changed = [name for name, version in versions.items() if _version(features[name]) != version]
    if changed:
        raise UserError(
            f"what follows {', '.join(type(module).__name__ for module in modules)} changes "
            f"{', '.join(changed)} in place, so that other features would be distilled than it "
            "puts out: let it make new tensors (ReLU(inplace=False))"
        )


def _version(feature: Tensor) -> int:
    """Counts the changes in place of a tensor; 0 where torch keeps no count."""
    return 0 if feature.is_inference() else feature._version


def _check_features(
    module: nn.Module, args: tuple, output: object, wanted: Sequence[str] | None
) -> None:
    """Compare what a module puts out with what it declares: levels are paired by that.

    Raises:
        UserError: it is no dict of the declared levels, or a map has another stride.
    """
    name, declared = type(module).__name__, dict(module.output_shape())
    # A backbone may pad its input to what its coarsest level can be made of.
    unit = max(shape.stride for shape in declared.values())
    declared = {k: v for k, v in declared.items() if wanted is None or k in wanted}
    if not isinstance(output, Mapping) or not set(declared) <= set(output):
        found = sorted(output) if isinstance(output, Mapping) else f"a {type(output).__name__}"
        raise UserError(
            f"{name} puts out {found}, but its output_shape() says {sorted(declared)}: it must put "
            "out a dict of these"
        )
    images = args[0] if args else None
    if not isinstance(images, Tensor):  # Of stems, whose input is a pyramid.
        return
    for level, shape in declared.items():
        cells = tuple(output[level].shape[-2:])
        sides = tuple(images.shape[-2:])
        if not all(map(_fits, cells, sides, [shape.stride] * 2, [unit] * 2)):
            expected = [math.ceil(side / shape.stride) for side in sides]
            raise UserError(
                f"{name} puts out {cells[0]} x {cells[1]} cells on {level} of an input of "
                f"{sides[0]} x {sides[1]} pixels, but the stride of {shape.stride} in its "
                f"output_shape() makes {expected[0]} x {expected[1]}: correct the stride"
            )


def _fits(cells: int, side: int, stride: int, unit: int) -> bool:
    """Whether a level has so many cells along a side, which may have been padded or cut to a unit.

    Kernels that do not reach over the border leave out one cell more.
    """
    least, most = (round_to(side / unit) * unit / stride for round_to in (math.floor, math.ceil))
    return least - 1 <= cells <= most + 1


def check_not_resized(
    model: nn.Module, items: Sequence[dict[str, Tensor]], images: ImageList, who: str
) -> None:
    """Refuse a ``preprocess_image`` that resizes: cells would be looked for where they are not.

    Raises:
        UserError: an image has another size than its item.
    """
    for item, size in zip(items, images.image_sizes, strict=True):
        given, size = tuple(item["image"].shape[-2:]), tuple(map(int, size))
        if size != given:
            raise UserError(
                f"the {who}'s preprocess_image makes {size[0]} x {size[1]} pixels of an image of "
                f"{given[0]} x {given[1]} ({type(model).__name__}): let the mapper resize images "
                "instead"
            )


def guard_square_padding(model: nn.Module, who: str) -> None:
    """Let every forward of a detector, in training and in evaluation, check its images first."""
    model.register_forward_pre_hook(
        lambda module, args: check_fits_square_padding(module, args[0], who)
    )


def check_fits_square_padding(
    model: nn.Module, batched_inputs: Sequence[dict[str, Tensor]], who: str
) -> None:
    """Refuse an image that Detectron2 would not pad as the backbone needs it, without a word.

    It crops a single image larger than the square that the backbone pads to; and it does not know
    the key under which its ``SimpleFeaturePyramid`` asks for sizes that can be divided.

    Raises:
        UserError: it names the image, or the batch, and both sizes.
    """
    constraints = dict(getattr(model.backbone, "padding_constraints", {}))
    square = constraints.get("square_size", 0)
    if not square:
        _check_divisible(batched_inputs, constraints.get("size_divisiblity", 0), who)
        return
    for item in batched_inputs:
        height, width = item["image"].shape[-2:]
        if max(height, width) > square:
            raise UserError(
                f"an image of {height} x {width} pixels ({item.get('file_name', 'no file name')}) "
                f"is larger than the square of {square} that the {who}'s backbone pads to: resize "
                "it to fit, or raise square_pad"
            )


def _check_divisible(batched_inputs: Sequence[dict[str, Tensor]], divisor: int, who: str) -> None:
    if divisor <= 1:
        return
    height, width = (max(item["image"].shape[i] for item in batched_inputs) for i in (-2, -1))
    if height % divisor or width % divisor:
        raise UserError(
            f"a batch of {height} x {width} pixels cannot be divided by the {divisor} that the "
            f"{who}'s backbone needs, and Detectron2 does not pad it to that: set square_pad to a "
            f"multiple of {divisor}, at least the largest image"
        )

"""YOLOX's weights in mmdet's layout, under the keys of the authors' code."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

# mmdet's name of a part, at the start of a key, and the authors'.
_PARTS = {
    "backbone.stem.": "backbone.backbone.stem.",
    **{f"backbone.stage{i}.": f"backbone.backbone.dark{i + 1}." for i in range(1, 5)},
    "neck.reduce_layers.0.": "backbone.lateral_conv0.",
    "neck.reduce_layers.1.": "backbone.reduce_conv1.",
    "neck.top_down_blocks.0.": "backbone.C3_p4.",
    "neck.top_down_blocks.1.": "backbone.C3_p3.",
    "neck.downsamples.0.": "backbone.bu_conv2.",
    "neck.downsamples.1.": "backbone.bu_conv1.",
    "neck.bottom_up_blocks.0.": "backbone.C3_n3.",
    "neck.bottom_up_blocks.1.": "backbone.C3_n4.",
    "neck.out_convs.": "head.stems.",
    "bbox_head.multi_level_cls_convs.": "head.cls_convs.",
    "bbox_head.multi_level_reg_convs.": "head.reg_convs.",
    "bbox_head.multi_level_conv_cls.": "head.cls_preds.",
    "bbox_head.multi_level_conv_reg.": "head.reg_preds.",
    "bbox_head.multi_level_conv_obj.": "head.obj_preds.",
}
# And of the parts of those.
_WITHIN = {
    "main_conv": "conv1",
    "short_conv": "conv2",
    "final_conv": "conv3",
    "blocks": "m",
    "depthwise_conv": "dconv",
    "pointwise_conv": "pconv",
}
# No weights: how it prepares its images, and what its EMA hook keeps, which is not the average:
# the hook has swapped the two before a checkpoint is written.
_BESIDE = ("data_preprocessor.", "ema_")


def is_mmdet(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith("bbox_head.multi_level_") for key in state)


def from_mmdet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A key that is none of mmdet's YOLOX stays, for strict loading to name."""
    return {_renamed(key): v for key, v in state.items() if not key.startswith(_BESIDE)}


def _renamed(key: str) -> str:
    part = next((part for part in _PARTS if key.startswith(part)), None)
    if part is None:
        return key
    rest = [_WITHIN.get(name, name) for name in key.removeprefix(part).split(".")]
    return _PARTS[part] + ".".join(rest)

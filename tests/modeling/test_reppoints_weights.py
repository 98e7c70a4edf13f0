"""mmdet's checkpoints of RepPoints under this project's keys, and the configs that have them."""

import json
import re
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import FPN
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock
from golden_fill import fill
from omegaconf import OmegaConf
from reppoints_toys import NUM_CLASSES, batch, detector, item

from dfd.modeling import P6P7, DeformConvBlock, RepPointsHead

MODELS = Path(__file__).parents[2] / "configs" / "common" / "models"
KEYS = json.loads((Path(__file__).parent / "golden" / "reppoints_keys.json").read_text())
R50_GN, R50 = (
    next(name for name in KEYS if part in name) for part in ("fpn-gn_head-gn", "r50_fpn_1x")
)


def config_function(name):
    return LazyConfig.load(str(MODELS / f"{name}.py"), (name,))[0]


def on_meta(config):
    """A detector without the memory of its weights."""
    with torch.device("meta"):
        return instantiate(config)


def golden_state(name):
    return {
        key: torch.empty([int(side) for side in shape.split("x") if side], device="meta")
        for key, shape in KEYS[name]["keys"].items()
    }


def assert_fits(model, state):
    """Strictly, both ways, and each shape."""
    expected = {
        key: value.shape
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    assert {key: value.shape for key, value in model.convert_weights(state).items()} == expected


@pytest.mark.parametrize("trunk_norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize("name", [R50_GN, R50])
def test_keys_and_shapes_of_mmdets_r50(name, trunk_norm):
    norm = "GN" if name == R50_GN else ""
    model = on_meta(config_function("reppoints")(norm=norm, trunk_norm=trunk_norm))
    assert_fits(model, golden_state(name))


def trunk_state(blocks, width, deformable):
    """What mmdet's ResNeXt with 32 groups holds."""
    shapes = {"conv1.weight": (64, 3, 7, 7)}
    norms = {"bn1": 64}
    inputs = 64
    for stage, count in enumerate(blocks, 1):
        middle, outputs = 32 * width * 2 ** (stage - 1), 256 * 2 ** (stage - 1)
        for block in range(count):
            at = f"layer{stage}.{block}"
            shapes[f"{at}.conv1.weight"] = (middle, inputs, 1, 1)
            shapes[f"{at}.conv2.weight"] = (middle, middle // 32, 3, 3)
            shapes[f"{at}.conv3.weight"] = (outputs, middle, 1, 1)
            norms.update({f"{at}.bn1": middle, f"{at}.bn2": middle, f"{at}.bn3": outputs})
            if deformable and stage > 1:
                shapes[f"{at}.conv2.conv_offset.weight"] = (18, middle, 3, 3)
                shapes[f"{at}.conv2.conv_offset.bias"] = (18,)
            if block == 0:
                shapes[f"{at}.downsample.0.weight"] = (outputs, inputs, 1, 1)
                norms[f"{at}.downsample.1"] = outputs
            inputs = outputs
    for name, channels in norms.items():
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{leaf}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()
    return {f"backbone.{key}": torch.empty(s, device="meta") for key, s in shapes.items()}


@pytest.mark.parametrize("old", [False, True])
def test_keys_and_shapes_of_x101_32x4d_dcn(old):
    state = {k: v for k, v in golden_state(R50_GN).items() if not k.startswith("backbone.")}
    state.update(trunk_state((3, 4, 23, 3), 4, deformable=True))
    if old:  # Until mmdet 1.0.
        state = {key.replace("conv2.conv_offset", "conv2_offset"): v for key, v in state.items()}
    reppoints = config_function("reppoints")
    config = reppoints(101, num_groups=32, width_per_group=4, deformable=True)
    assert_fits(on_meta(config), state)


def test_r101():
    keys = on_meta(config_function("reppoints")(101)).state_dict()
    blocks = {key.split(".")[3] for key in keys if key.startswith("backbone.bottom_up.res4")}
    assert len(blocks) == 23


def deformable_detector(norm="GN"):
    torch.manual_seed(0)
    stages = [
        ResNet.make_stage(
            DeformConvBlock if stage else BottleneckBlock,
            1,
            stride_per_block=[1 + (stage > 0)],
            in_channels=4 if stage == 0 else 4 * 2**stage,
            out_channels=8 * 2**stage,
            bottleneck_channels=8,
            num_groups=2,
            norm="FrozenBN",
        )
        for stage in range(4)
    ]
    levels = ["res3", "res4", "res5"]
    trunk = ResNet(BasicStem(3, 4, norm="FrozenBN"), stages, out_features=levels)
    backbone = FPN(trunk, levels, 64, norm=norm, top_block=P6P7(64, 64, norm=norm))
    head = RepPointsHead(64, NUM_CLASSES, feat_channels=64, num_convs=2, norm=norm)
    return detector(backbone, head)


def mmdet_key(key):
    """The other way round, by the table of the modules."""
    for ours, theirs in (
        (r"^head\.", "bbox_head."),
        (r"^backbone\.fpn_lateral(\d)\.", lambda m: f"neck.lateral_convs.{int(m[1]) - 3}.conv."),
        (r"^backbone\.fpn_output(\d)\.", lambda m: f"neck.fpn_convs.{int(m[1]) - 3}.conv."),
        (r"^backbone\.top_block\.p(\d)\.", lambda m: f"neck.fpn_convs.{int(m[1]) - 3}.conv."),
        (r"^(neck.*)conv\.norm\.", r"\1gn."),
        (r"^backbone\.bottom_up\.stem\.", "backbone."),
        (r"^backbone\.bottom_up\.res(\d)\.", lambda m: f"backbone.layer{int(m[1]) - 1}."),
        (r"^(backbone.*)shortcut\.norm\.", r"\1downsample.1."),
        (r"^(backbone.*)shortcut\.", r"\1downsample.0."),
        (r"^(backbone.*)conv(\d)\.norm\.", r"\1bn\2."),
    ):
        key = re.sub(ours, theirs, key)
    return key


@pytest.mark.parametrize("norm", ["GN", ""])
def test_a_file_of_mmdet_gives_the_same_detector(norm, tmp_path):
    trained = deformable_detector(norm)
    fill(trained)
    state = {mmdet_key(key): value for key, value in trained.state_dict().items()}
    assert {"backbone.bn1.weight", "neck.fpn_convs.4.conv.weight"} <= set(state)
    for key in [key for key in state if key.endswith("running_var")]:
        state[key.replace("running_var", "num_batches_tracked")] = torch.tensor(5)
    path = tmp_path / "reppoints.pth"
    torch.save({"meta": {"epoch": 24}, "state_dict": state}, path)
    model = deformable_detector(norm)
    model.load_state_dict(model.convert_weights(torch.load(path)["state_dict"]))
    for key, value in model.state_dict().items():
        assert torch.equal(value, trained.state_dict()[key]), key
    with torch.no_grad():
        expected, found = (one.eval()([item(64, 90)])[0]["instances"] for one in (trained, model))
    assert len(found) == len(expected) > 0
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_own_weights_stay_as_they_are():
    model = deformable_detector()
    state = model.state_dict()
    assert model.convert_weights(state) is state


def test_what_has_no_place_is_left_for_strict_loading_to_name():
    model = deformable_detector()
    state = {mmdet_key(key): value for key, value in model.state_dict().items()}
    state["neck.something.weight"] = state["other"] = torch.zeros(1)
    result = model.load_state_dict(model.convert_weights(state), strict=False)
    assert result.unexpected_keys == ["neck.something.weight", "other"]
    assert not result.missing_keys


def test_a_detector_over_deformable_blocks_trains():
    model = deformable_detector()
    sum(model(batch()).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_small_config_trains_and_can_be_saved(tmp_path):
    config = config_function("small_reppoints")(
        (1, 1, 1, 1), width=8, fpn_channels=64, head_channels=32
    )
    config.num_classes = NUM_CLASSES
    saved = tmp_path / "config.yaml"
    LazyConfig.save(OmegaConf.create({"model": config}, flags={"allow_objects": True}), str(saved))
    assert list(tmp_path.iterdir()) == [saved]  # A lambda would have made it a pickle.
    model = instantiate(LazyConfig.load(str(saved)).model)
    assert sum(model(batch()).values()).isfinite()
    assert len(model.eval()(batch())) == 2
    assert sorted(model.backbone.output_shape()) == ["p3", "p4", "p5", "p6", "p7"]


def test_full_config_can_be_saved(tmp_path):
    config = config_function("reppoints")(101, num_groups=32, width_per_group=4, deformable=True)
    saved = tmp_path / "config.yaml"
    LazyConfig.save(OmegaConf.create({"model": config}, flags={"allow_objects": True}), str(saved))
    assert list(tmp_path.iterdir()) == [saved]

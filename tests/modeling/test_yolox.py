"""YOLOX as a detector: steps, evaluation, padding, settings, weights of other layouts."""

import math
import re

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.testing import assert_close

import dfd.modeling
from dfd.distill.contract import tap
from dfd.errors import UserError
from dfd.modeling import YOLOX, TimmPyramid, named_yolox
from dfd.modeling.yolox import simota
from dfd.weights.strict import load_strict, read_weights

SMALL = {"depth": 0.33, "width": 0.125, "num_classes": 3}
# What the authors call a part, and mmdet, for a key within it.
MMDET = [
    ("backbone.backbone.stem.", "backbone.stem."),
    ("backbone.backbone.dark2.", "backbone.stage1."),
    ("backbone.backbone.dark3.", "backbone.stage2."),
    ("backbone.backbone.dark4.", "backbone.stage3."),
    ("backbone.backbone.dark5.", "backbone.stage4."),
    ("backbone.lateral_conv0.", "neck.reduce_layers.0."),
    ("backbone.reduce_conv1.", "neck.reduce_layers.1."),
    ("backbone.C3_p4.", "neck.top_down_blocks.0."),
    ("backbone.C3_p3.", "neck.top_down_blocks.1."),
    ("backbone.bu_conv2.", "neck.downsamples.0."),
    ("backbone.bu_conv1.", "neck.downsamples.1."),
    ("backbone.C3_n3.", "neck.bottom_up_blocks.0."),
    ("backbone.C3_n4.", "neck.bottom_up_blocks.1."),
    ("head.stems.", "neck.out_convs."),
    ("head.cls_convs.", "bbox_head.multi_level_cls_convs."),
    ("head.reg_convs.", "bbox_head.multi_level_reg_convs."),
    ("head.cls_preds.", "bbox_head.multi_level_conv_cls."),
    ("head.reg_preds.", "bbox_head.multi_level_conv_reg."),
    ("head.obj_preds.", "bbox_head.multi_level_conv_obj."),
]


def small(**settings):
    torch.manual_seed(0)
    return YOLOX(**{**SMALL, **settings})


def image(height=64, width=96, boxes=((8, 8, 40, 48), (30, 10, 90, 60)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.arange(len(boxes)) % 3
    pixels = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return {"image": pixels, "instances": instances}


def step(model, batch):
    losses = model.train()(batch)
    sum(losses.values()).backward()
    return losses


def assert_all_take_part(model):
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(("form", "depthwise"), [("main", False), ("v030", True)])
def test_it_learns(form, depthwise):
    model = small(form=form, depthwise=depthwise)
    batch = [image(64, 64, ((8, 8, 40, 48),)), image(48, 64, ((5, 5, 40, 40),), seed=1)]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    totals = []
    for _ in range(20):
        optimizer.zero_grad()
        losses = step(model, batch)
        assert set(losses) == {"loss_iou", "loss_obj", "loss_cls"}
        totals.append(sum(losses.values()).item())
        optimizer.step()
    assert_all_take_part(model)
    assert totals[-1] < 0.8 * totals[0]


def test_the_same_step_has_the_same_bits():
    def run():
        model = small()
        losses = step(model, [image(), image(seed=1)])
        return losses, [p.grad for p in model.parameters()], list(model.buffers())

    for once, again in zip(run(), run(), strict=True):
        assert_close(once, again, rtol=0, atol=0)


@pytest.mark.parametrize(
    "boxes",
    [
        (),
        # Outside the image, so that no cell is near.
        ((900, 900, 940, 940),),
        # Negative width, negative height, no number, and no end.
        ((40, 8, 8, 48), (8, 48, 40, 8), (8, 8, float("nan"), 40), (8, 8, 40, float("inf"))),
    ],
    ids=["none", "far", "impossible"],
)
@pytest.mark.parametrize("form", ["main", "v030"])
def test_without_positives_every_parameter_takes_part(boxes, form):
    model = small(form=form, l1_from_iter=0)
    with EventStorage(0):
        losses = step(model, [image(boxes=boxes), image(boxes=boxes, seed=1)])
    assert_all_take_part(model)
    assert [losses[f"loss_{name}"].item() for name in ("iou", "cls", "l1")] == [0, 0, 0]
    assert losses["loss_obj"].item() > 0


def test_impossible_objects_change_nothing_for_the_others():
    boxes = ((8, 8, 40, 48), (30, 10, 90, 60))
    model = small()
    expected = step(model, [image(boxes=boxes)])
    with_impossible = image(boxes=(*boxes, (40, 20, 10, 40), (8, 8, float("nan"), 40)))
    losses = step(small(), [with_impossible])
    assert_close(losses, expected, rtol=0, atol=0)


def test_objects_without_area_have_finite_losses():
    model = small(l1_from_iter=0)
    with EventStorage(0):
        losses = step(model, [image(boxes=((20, 20, 20, 20), (8, 8, 8, 40)))])
    assert_all_take_part(model)
    assert losses["loss_iou"].item() == 5  # Nothing overlaps them; the divisor is their cells.
    assert losses["loss_l1"].item() > 10  # The logarithm of no width.


@pytest.mark.parametrize("form", ["main", "v030"])
def test_steps_in_bf16(form):
    model, exact = small(form=form), small(form=form)
    batch = [image(), image(boxes=(), seed=1)]
    expected = step(exact, batch)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()(batch)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    assert_all_take_part(model)
    assert losses["loss_obj"].item() == pytest.approx(expected["loss_obj"].item(), rel=0.2)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = model.eval()(batch)[0]["instances"]
    assert found.pred_boxes.tensor.dtype == torch.float32


def test_matching_is_in_float32_whatever_surrounds_it():
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    centres = (torch.stack([columns, rows], -1).flatten(0, 1) + 0.5) * 8
    logits = torch.randn(64, 5, generator=generator).bfloat16()
    sizes = 8 + 16 * torch.rand(64, 2, generator=generator)
    boxes = torch.cat([centres, sizes], 1).bfloat16()
    gt_boxes, gt_classes = (
        torch.tensor([[20.0, 24, 18, 20], [40, 40, 16, 16]]),
        torch.tensor([1, 3]),
    )
    strides = torch.full((64,), 8.0)
    arguments = gt_boxes, gt_classes, centres, strides
    expected = simota(logits[:, :4].float(), logits[:, 4].float(), boxes.float(), *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        matches = simota(logits[:, :4], logits[:, 4], boxes, *arguments)
    assert matches.matched_iou.dtype == torch.float32
    assert_close(tuple(matches), tuple(expected), rtol=0, atol=0)
    assert set(expected.matched_gt.tolist()) == {-1, 0, 1}


def test_losses_are_divided_by_the_divisor_alone():
    batch = [image(), image(boxes=((8, 8, 30, 30),), seed=1)]
    model = small()
    seen = []

    def ten(positives):
        seen.append(positives)
        return torch.tensor(10.0)

    expected = step(model, batch)
    other = small()
    other.divisor = ten
    losses = step(other, batch)
    count = seen[0]
    assert len(seen) == 1 and count.ndim == 0 and count > 1
    for name, loss in losses.items():
        assert (loss * 10).item() == pytest.approx((expected[name] * count).item(), rel=1e-5)
    assert model.divisor(torch.tensor(0)) == 1 and model.divisor(torch.tensor(7)) == 7


def test_l1_is_on_from_its_iteration():
    model = small(l1_from_iter=5)
    for iteration, on in ((4, False), (5, True), (6, True)):  # As a resumed run starts, too.
        with EventStorage(iteration):
            assert ("loss_l1" in step(model, [image()])) == on
    with EventStorage(10**6):
        assert "loss_l1" not in step(small(), [image()])


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0, 0, 0), (1, 1, 1)), ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))],
)
def test_the_network_sees_grey_padding(mean, std):
    model = small(pixel_mean=mean, pixel_std=std, input_format="RGB")
    batch = [image(50, 70), image(33, 90, seed=1)]
    images = model.preprocess_image(batch)
    assert images.tensor.shape == (2, 3, 64, 96)
    assert images.image_sizes == [(50, 70), (33, 90)]
    scaled = images.tensor * model.pixel_std + model.pixel_mean
    for canvas, item in zip(scaled, batch, strict=True):
        height, width = item["image"].shape[-2:]
        assert_close(canvas[:, :height, :width], item["image"].float(), rtol=0, atol=1e-3)
        assert_close(canvas[:, height:], torch.full_like(canvas[:, height:], 114.0))
        assert_close(canvas[..., width:], torch.full_like(canvas[..., width:], 114.0))


def test_images_of_integers_and_of_floats_make_a_batch():
    model = small()
    first, second = image(), image(seed=1)
    second["image"] = second["image"].float() + 0.5
    tensor = model.preprocess_image([first, second]).tensor
    assert torch.equal(tensor[1], second["image"])


def confident(**settings):
    """A detector that finds something everywhere."""
    model = small(**settings).eval()
    for conv in (*model.head.obj_preds, *model.head.cls_preds):
        nn.init.normal_(conv.weight, std=0.5)
        nn.init.zeros_(conv.bias)
    return model


@torch.no_grad()
def test_detections_are_scaled_and_lie_within_the_image():
    model = confident(score_thresh=0.1)
    plain = model([image(50, 70), image(64, 96, seed=1)])
    scaled = model([image(50, 70) | {"height": 100, "width": 210}, image(64, 96, seed=1)])
    found, larger = plain[0]["instances"], scaled[0]["instances"]
    assert len(plain) == 2 and len(found) == len(larger) > 5
    assert found.image_size == (50, 70) and larger.image_size == (100, 210)
    assert_close(larger.pred_boxes.tensor, found.pred_boxes.tensor * torch.tensor([3.0, 2, 3, 2]))
    boxes = found.pred_boxes.tensor
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 70 and boxes[:, 3].max() <= 50
    assert found.pred_boxes.nonempty().all()
    assert found.scores.min() >= 0.1 and (found.scores.diff() <= 0).all()
    assert set(found.pred_classes.tolist()) <= {0, 1, 2}


@torch.no_grad()
def test_detections_are_limited_only_when_asked():
    everything = confident()([image()])[0]["instances"]
    some = confident(max_detections=3)([image()])[0]["instances"]
    assert len(everything) > 20
    assert_close(some.scores, everything.scores[:3])


@torch.no_grad()
def test_a_box_without_end_is_no_detection():
    model = confident()
    for conv in model.head.reg_preds:
        nn.init.constant_(conv.bias, 1e4)
    assert len(model([image()])[0]["instances"]) == 0


def test_an_image_is_found_alike_alone_and_padded_in_a_batch():
    model = confident()
    with torch.no_grad():
        # Padded to 64 x 96 both times: to the stride alone, and to the other's size.
        alone = model([image(50, 90)])[0]["instances"]
        batch = model([image(50, 90), image(64, 96, seed=3)])[0]["instances"]
    assert_close(alone.pred_boxes.tensor, batch.pred_boxes.tensor)
    assert_close(alone.scores, batch.scores)


def test_levels_of_backbone_and_stems():
    model = small()
    expected = {"p3": (32, 8), "p4": (64, 16), "p5": (128, 32)}
    shapes = {k: ShapeSpec(channels=c, stride=s) for k, (c, s) in expected.items()}
    assert model.backbone.output_shape() == shapes
    assert model.backbone.size_divisibility == 32
    stems = model.head.stems
    assert stems.output_shape() == {
        k: ShapeSpec(channels=32, stride=s) for k, (_, s) in expected.items()
    }
    for module in (model.backbone, stems):
        with tap([module]) as features:  # Which refuses a module that does not run exactly once.
            model.train()([image()])
        for name, shape in module.output_shape().items():
            assert features[name].shape == (
                1,
                shape.channels,
                64 // shape.stride,
                96 // shape.stride,
            )
    # After the activation, which is never below -0.28.
    assert features["p3"].min() > -0.3 and features["p3"].max() > 0.5
    assert type(stems).__name__ == "Stems" and isinstance(stems, nn.ModuleList)


def test_over_a_trunk_of_timm():
    """Any trunk with the three strides serves; the levels keep the width's channels."""
    trunk = TimmPyramid(model_name="test_efficientnet", out_features=["c3", "c4", "c5"])
    model = small(trunk=trunk)
    expected = {"p3": (32, 8), "p4": (64, 16), "p5": (128, 32)}
    shapes = {k: ShapeSpec(channels=c, stride=s) for k, (c, s) in expected.items()}
    assert model.backbone.output_shape() == shapes
    pictures = torch.rand(1, 3, 64, 96)
    for name, features in model.backbone(pictures).items():
        channels, stride = shapes[name].channels, shapes[name].stride
        assert features.shape == (1, channels, 64 // stride, 96 // stride)
    sum(model.train()([image()]).values()).backward()
    assert all(p.grad is not None for p in trunk.parameters())
    # A trunk that is made for one size of image says so through the pyramid.
    trunk.__dict__["_img_size"] = 128
    assert model.backbone.padding_constraints == {"size_divisibility": 32, "square_size": 128}
    with pytest.raises(UserError, match="trunk's levels have the strides .*c2.*out_features"):
        small(trunk=TimmPyramid(model_name="test_efficientnet"))


def test_official_checkpoint_loads_strictly(tmp_path):
    source = confident()
    path = str(tmp_path / "yolox.pth")
    torch.save({"start_epoch": 300, "model": source.state_dict(), "best_ap": 0.4}, path)
    weights = read_weights(path, "weights")
    assert not any("pixel" in key for key in weights.model)
    model = small()
    state = model.convert_weights(weights.model)
    assert state == weights.model
    load_strict(model, weights, "weights")
    with torch.no_grad():
        found, expected = model.eval()([image()]), source([image()])
    assert torch.equal(found[0]["instances"].scores, expected[0]["instances"].scores)


def to_mmdet(key):
    theirs, part = next((new, old) for old, new in MMDET if key.startswith(old))
    rest = key.removeprefix(part)
    if "dark" in part or ".C3_" in part:  # SPPBottleneck and Bottleneck keep their names.
        layer = "" if ".C3_" in part else r"\d\."
        spp = "dark5" in part and rest.startswith("1.")
        if not spp:
            for ours, name in (("conv1", "main"), ("conv2", "short"), ("conv3", "final")):
                rest = re.sub(rf"^({layer}){ours}\.", rf"\g<1>{name}_conv.", rest)
            rest = re.sub(rf"^({layer})m\.", r"\g<1>blocks.", rest)
    rest = rest.replace("dconv.", "depthwise_conv.").replace("pconv.", "pointwise_conv.")
    return theirs + rest


@pytest.mark.parametrize("name", ["s", "nano"])
def test_weights_of_mmdet(name):
    with torch.device("meta"):
        model = named_yolox(name, num_classes=80)
    ours = dict(model.state_dict())
    theirs = {to_mmdet(key): value for key, value in ours.items()}
    assert len(theirs) == len(ours) and not set(theirs) & set(ours)
    for key in (
        "backbone.stage4.2.main_conv.conv.weight",
        "backbone.stage4.1.conv1.conv.weight",
        "backbone.stage1.1.blocks.0.conv1.bn.weight",
        "neck.top_down_blocks.0.short_conv.bn.running_var",
        "bbox_head.multi_level_conv_obj.2.bias",
    ):
        assert key in theirs
    beside = {"ema_backbone_stem_conv_conv_weight": torch.zeros(1), "data_preprocessor.mean": None}
    converted = model.convert_weights(theirs | beside | {"neck.strange": torch.zeros(1)})
    assert converted.pop("neck.strange") is not None  # For strict loading to name.
    assert converted.keys() == ours.keys()
    assert all(converted[key] is value for key, value in ours.items())
    assert model.convert_weights(ours) == ours


def test_weights_of_mmdet_for_other_pixels_are_refused():
    model = small()
    theirs = {to_mmdet(key): value for key, value in model.state_dict().items()}
    same = {"data_preprocessor.mean": torch.zeros(3, 1, 1)}
    assert model.convert_weights(theirs | same).keys() == model.state_dict().keys()
    other = {"data_preprocessor.std": torch.full((3, 1, 1), 58.0)}
    with pytest.raises(UserError, match="pixel_std"):
        model.convert_weights(theirs | other)


def test_named_in_a_config():
    config = L(named_yolox)(name="nano", num_classes=2, form="v030", l1_from_iter=7)
    with torch.device("meta"):
        model = instantiate(config)
    assert (model.num_classes, model.form, model.l1_from_iter) == (2, "v030", 7)
    assert dfd.modeling.yolox.simota is simota


@pytest.mark.parametrize(
    "settings",
    [
        {"depth": 0},
        {"depth": "s"},
        {"width": 0},
        {"width": 0.13},
        {"num_classes": 0},
        {"num_classes": 2.0},
        {"activation": "gelu"},
        {"form": "0.3.0"},
        {"score_thresh": 1.5},
        {"nms_thresh": -0.1},
        {"max_detections": 0},
        {"l1_from_iter": -1},
        {"input_format": "L"},
        {"pixel_mean": (0.0, 0.0)},
        {"pixel_std": (1.0, 0.0, 1.0)},
    ],
    ids=str,
)
def test_settings_out_of_range(settings):
    with pytest.raises(UserError, match=next(iter(settings))) as error:
        small(**settings)
    assert "\n" not in str(error.value)


def test_unknown_name():
    with pytest.raises(UserError, match="'xl'.*nano, tiny, s, m, l, x"):
        named_yolox("xl", num_classes=80)


def test_simota_names_the_forms():
    empty = torch.zeros(0)
    with pytest.raises(UserError, match="main, v030"):
        simota(empty, empty, empty, empty, empty, empty, empty, form="v3")


def cells_of_an_image():
    """Predictions of a level of 8 x 8 cells, and two objects, as the arguments of ``simota``."""
    generator = torch.Generator().manual_seed(0)
    row = torch.arange(8.0)
    centres = (torch.cartesian_prod(row, row).flip(1) + 0.5) * 8
    shift, sides = torch.rand(2, 64, 2, generator=generator)
    return {
        "class_logits": torch.randn(64, 3, generator=generator),
        "objectness_logits": torch.randn(64, generator=generator),
        "boxes": torch.cat([centres + shift, 8 + 16 * sides], dim=1),
        "gt_boxes": torch.tensor([[20.0, 20.0, 24.0, 24.0], [40.0, 44.0, 16.0, 24.0]]),
        "gt_classes": torch.tensor([2, 0]),
        "centres": centres,
        "strides": torch.full((64,), 8.0),
    }


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float32], ids=str)
def test_classes_of_any_type_are_matched_alike(dtype):
    given = cells_of_an_image()
    # Three objects of three classes: as a mask, uint8 would have just the right length.
    given["gt_boxes"] = torch.cat([given["gt_boxes"], torch.tensor([[50.0, 12, 20, 20]])])
    given["gt_classes"] = torch.tensor([2, 1, 0])
    expected = simota(**given)
    found = simota(**{**given, "gt_classes": given["gt_classes"].to(dtype)})
    assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["main", "v030"])
@pytest.mark.parametrize("strange", [(math.nan,) * 4, (0.0, 0.0, math.inf, 0.0)], ids=str)
def test_a_predicted_box_that_is_no_number_is_the_last_choice(form, strange):
    given = cells_of_an_image()
    best = int(simota(**given, form=form).matched_iou.argmax())
    given["boxes"][best] = torch.tensor(strange)
    matched = simota(**given, form=form)
    assert matched.matched_iou.isfinite().all()
    assert matched.matched_gt[best] == -1
    assert set(matched.matched_gt.tolist()) == {-1, 0, 1}
    given["boxes"][:] = torch.tensor(strange)
    matched = simota(**given, form=form)
    assert matched.matched_iou.tolist() == [0] * 64


@pytest.mark.parametrize("bias", [60.0, 1e4])
def test_sides_beyond_float32_have_finite_gradients(bias):
    """As of a network that diverges, in fp16 above all."""
    model = small(l1_from_iter=0)
    for conv in model.head.reg_preds:
        nn.init.constant_(conv.bias[2:], bias)
    with EventStorage(0):
        losses = step(model, [image()])
    assert losses["loss_iou"].item() == pytest.approx(5)  # Nothing in common, whoever is matched.
    assert_all_take_part(model)


@pytest.mark.parametrize("settings", [{"depth": math.nan}, {"pixel_mean": (0, math.inf, 0)}])
def test_settings_that_are_no_finite_number(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        small(**settings)


@pytest.mark.parametrize("settings", [{"form": ["main"]}, {"activation": ["silu"]}], ids=str)
def test_settings_that_are_a_list(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        small(**settings)

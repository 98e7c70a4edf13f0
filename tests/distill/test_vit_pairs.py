"""Pairs with a ViT on one side or both: a training step and an evaluation of each."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from PIL import Image
from toys import faster_rcnn_config, instantiate_seeded, make_batch, resnext_config
from vit_toys import detectron2_vit_config, timm_vit_config

from dfd import DFDHead, DistilledDetector, FrozenTeacher, UserError
from dfd.data import TwoSizeMapper
from dfd.distill.real_pixels import RealPixels
from dfd.distill.same_cells import resample
from dfd.losses import CWDLoss, DFDLoss, MimicLoss

PAIRS = {
    "Detectron2's ViT to timm's S": (detectron2_vit_config, timm_vit_config),
    "Detectron2's ViT to timm's T": (detectron2_vit_config, lambda: timm_vit_config(width=16)),
    "timm's ViT to ResNet": (timm_vit_config, faster_rcnn_config),
    "ResNeXt to timm's ViT": (resnext_config, timm_vit_config),
    "DINOv3 to Detectron2's ViT": (
        lambda: timm_vit_config("vit_small_patch16_dinov3"),
        detectron2_vit_config,
    ),
    "ResNet to DINOv3": (faster_rcnn_config, lambda: timm_vit_config("vit_small_patch16_dinov3")),
}


def pair(teacher, student, teacher_settings=None, **head):
    head.setdefault("criterion", DFDLoss())
    return DistilledDetector(
        student=instantiate_seeded(student, 0),
        teacher=FrozenTeacher(
            model=instantiate_seeded(teacher, 1), allow_random=True, **(teacher_settings or {})
        ),
        head=DFDHead(**head),
    )


def step(model, batch):
    model.train()
    with EventStorage(0):
        losses = model(batch)
        sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    return {name: loss for name, loss in losses.items() if name.startswith("loss_dfd_")}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", PAIRS)
def test_pair_trains_and_evaluates(name, precision):
    teacher, student = (config() for config in PAIRS[name])
    model = pair(teacher, student, {"precision": precision})
    batch = make_batch([(70, 90), (64, 100)])
    losses = step(model, batch)
    assert set(losses) == {f"loss_dfd_p{i}" for i in range(2, 7)}
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(p.grad is None for p in model.teacher.model.parameters())
    assert len(model.eval()(batch)) == 2


# What the pyramid is made from.


def test_tokens_of_the_last_block_are_distilled_before_the_pyramid():
    model = pair(detectron2_vit_config(), timm_vit_config(), levels=["last_feat"], trunk=True)
    (loss,) = step(model, make_batch()).items()
    assert loss[0] == "loss_dfd_last_feat"
    (found,) = model.head.pairs
    assert (found.stride, found.student_channels, found.teacher_channels) == (16, 32, 24)


def test_tokens_reach_the_trunk_alone_and_are_its_output():
    model = pair(detectron2_vit_config(), timm_vit_config(), levels=["last_feat"], trunk=True)
    model.train()
    batch = make_batch()
    seen = {}
    net = model.student.backbone.net
    net.register_forward_hook(lambda module, args, out: seen.update(out))
    with EventStorage(0):
        loss = model(batch)["loss_dfd_last_feat"]
        # By hand, from what the trunks put out.
        expected = model.head(
            seen,
            model.teacher(batch, input_format="BGR", trunk=True),
            [tuple(item["image"].shape[-2:]) for item in batch],
        )["loss_dfd_last_feat"]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert net.vit.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.student.backbone.simfp_2.parameters())


def test_tokens_beside_the_pyramid_under_any_criterion():
    model = pair(timm_vit_config(width=16), timm_vit_config(), trunk=True, criterion=CWDLoss())
    batch = make_batch()
    assert set(step(model, batch)) == {"loss_dfd_last_feat"} | {
        f"loss_dfd_p{i}" for i in range(2, 7)
    }
    assert "last_feat" in model.disparity_maps(batch)
    # A CNN's trunk is its stages, one of which has the stride of the tokens.
    model = pair(resnext_config(), timm_vit_config(), trunk=True, levels=["last_feat"])
    assert [pair.teacher_name for pair in model.head.pairs] == ["res4"]


def test_tokens_of_a_backbone_without_a_trunk_are_refused():
    teacher = instantiate_seeded(timm_vit_config())
    student = instantiate_seeded(timm_vit_config())
    student.backbone = student.backbone.net
    with pytest.raises(UserError, match="the student's backbone, a TimmViT, has no trunk"):
        DistilledDetector(
            student=student,
            teacher=FrozenTeacher(model=teacher, allow_random=True),
            head=DFDHead(criterion=DFDLoss(), trunk=True),
        )


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_tokens_under_the_name_of_a_level_are_refused(who):
    """One of the two would take the other's place."""
    models = {"student": timm_vit_config(), "teacher": timm_vit_config()}
    backbone = models[who].backbone
    backbone.net.out_feature = backbone.in_feature = "p4"
    with pytest.raises(UserError, match=f"the {who}'s trunk and pyramid both call a level p4"):
        pair(models["teacher"], models["student"], trunk=True)


# Two sizes.


def two_sizes(tmp_path, scale, size=(128, 192), train=True, **settings):
    """One labelled image through the mapper: a bright box on noise."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 100, (*size, 3), dtype=np.uint8)
    pixels[40:80, 20:100] = 255
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    mapper = TwoSizeMapper(
        is_train=train,
        augmentations=settings.pop("augmentations", []),
        image_format="BGR",
        teacher_scale=scale,
    )
    annotation = {"bbox": [20, 40, 100, 80], "bbox_mode": 0, "category_id": 1, "iscrowd": 0}
    record = {"file_name": str(path), "height": size[0], "width": size[1], "image_id": 0}
    return mapper(copy.deepcopy(record | {"annotations": [annotation]}))


@pytest.mark.parametrize("scale", [2.0, 0.5, 1.5])
def test_both_sizes_show_the_same_and_boxes_are_the_students(tmp_path, scale):
    item = two_sizes(tmp_path, scale, augmentations=[T.RandomFlip(prob=1.0)])
    assert item["teacher_image"].shape == (3, 128, 192)
    height, width = round(128 / scale), round(192 / scale)
    assert item["image"].shape == (3, height, width)
    (box,) = item["instances"].gt_boxes.tensor
    expected = torch.tensor([92 / scale, 40 / scale, 172 / scale, 80 / scale])
    torch.testing.assert_close(box, expected, atol=0.7, rtol=0)  # Sides are rounded.
    for image, (x0, y0, x1, y1) in (
        (item["image"], box.round().int().tolist()),
        (item["teacher_image"], (92, 40, 172, 80)),
    ):
        assert image[:, y0 + 2 : y1 - 2, x0 + 2 : x1 - 2].float().mean() > 250


def test_each_model_gets_its_size(tmp_path):
    model = pair(
        detectron2_vit_config(square_pad=192),
        timm_vit_config(square_pad=96),
        {"precision": "fp32", "scale": 2.0},
    )
    seen = {}
    for name, detector in (("student", model.student), ("teacher", model.teacher.model)):
        detector.backbone.register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0].shape[-1]})
        )
    item = two_sizes(tmp_path, 2.0)
    step(model, [item])
    assert seen == {"student": 96, "teacher": 192}
    # Its whole detector too; the original's height and width say where boxes are.
    (found,) = model.teacher.detect([item], input_format="BGR")
    assert found["instances"].image_size == (128, 192)


@pytest.mark.parametrize(
    ("align", "pairs"),
    [
        ("stride", [("p2", "p3"), ("p3", "p4"), ("p4", "p5"), ("p5", "p6")]),
        ("resize", [(f"p{i}", f"p{i}") for i in range(2, 7)]),
    ],
)
def test_levels_of_two_sizes_are_paired_as_the_policy_says(tmp_path, align, pairs):
    settings = {"precision": "fp32", "scale": 2.0}
    model = pair(resnext_config(), timm_vit_config(), settings, align=align)
    assert [(p.name, p.teacher_name) for p in model.head.pairs] == pairs
    item = two_sizes(tmp_path, 2.0)
    assert len(step(model, [item])) == len(pairs)
    maps = model.disparity_maps([item])
    assert maps["p2"][0].shape == (1, 16, 24) and maps["p2"][1].all()


def test_policy_that_pairs_nothing_is_refused_with_the_other():
    with pytest.raises(UserError, match="share no stride.*1.5 times as large.*align=resize"):
        pair(resnext_config(), timm_vit_config(), {"scale": 1.5})
    model = pair(resnext_config(), timm_vit_config(), {"scale": 1.5}, align="resize")
    assert len(model.head.pairs) == 5
    with pytest.raises(UserError, match="model.head.align is 'crop'"):
        DFDHead(criterion=DFDLoss(), align="crop")


@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_resampled_teacher_is_compared_cell_upon_cell(scale):
    """A student that is the teacher's map at its own size has nothing left to learn."""
    head = DFDHead(criterion=MimicLoss(), align="resize")
    shapes = {"p3": ShapeSpec(channels=2, stride=8)}
    head.attach(shapes, shapes, teacher_scale=scale)
    cells = torch.arange(16 * 24.0).view(16, 24)
    teacher = torch.stack([cells, -cells]).repeat_interleave(2, 1).repeat_interleave(2, 2)[None]
    sizes = [(round(256 / scale), round(384 / scale))]
    student, _ = resample(teacher, scale, 8, RealPixels(sizes).resized(scale))
    (loss,) = head({"p3": student}, {"p3": teacher}, sizes).values()
    (moved,) = head({"p3": student.roll(1, 3)}, {"p3": teacher}, sizes).values()
    assert loss == 0 and moved > 0.1


@pytest.mark.parametrize("ratio", [2.0, 0.5, 1.5])
def test_resampled_cells_keep_their_place(ratio):
    """A ramp stays a ramp: the value of a cell is that of the place of its centre."""
    height, width = 24, 36
    rows = (torch.arange(height) + 0.5).view(1, 1, -1, 1).expand(1, 1, height, width)
    columns = (torch.arange(width) + 0.5).view(1, 1, 1, -1).expand(1, 1, height, width)
    for ramp, dim in ((rows, 2), (columns, 3)):
        out, _ = resample(ramp, ratio, 8, RealPixels([(8 * height, 8 * width)]))
        expected = (torch.arange(out.shape[dim]) + 0.5) * ratio
        line = out.select(5 - dim, 3)[0, 0]
        # Away from the edge, beyond which there is nothing.
        torch.testing.assert_close(line[3:-3], expected[3:-3], atol=0.05, rtol=0)


@pytest.mark.parametrize("scale", [2.0, 1.5, 0.5])
def test_padding_of_a_resampled_teacher_is_never_distilled(scale):
    """More padding of the teacher's batch, of any content, changes nothing."""
    shapes = {"p2": ShapeSpec(channels=2, stride=4)}
    sizes = [(50, 60), (64, 44)]
    generator = torch.Generator().manual_seed(0)
    own = [round(64 * scale / 4) + 1, round(60 * scale / 4) + 1]
    teacher = torch.randn(2, 2, *own, generator=generator)
    student = torch.randn(2, 2, 16, 16, generator=generator)
    losses = []
    for pad in (0, 8):
        head = DFDHead(criterion=MimicLoss(), align="resize")
        head.attach(shapes, shapes, teacher_scale=scale)
        padded = F.pad(teacher, (0, pad, 0, pad))
        for image, (height, width) in zip(padded, sizes, strict=True):
            rows, columns = (-(-round(side * scale) // 4) for side in (height, width))
            image[:, rows:] = image[:, :, columns:] = 100.0 * pad
        losses.append(head({"p2": student}, {"p2": padded}, sizes)["loss_dfd_p2"])
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize(
    ("scale", "change", "line"),
    [
        (2.0, lambda item: item.pop("teacher_image"), "scale is 2, but there is no teacher_image"),
        (1.0, lambda item: None, "scale is 1, but the teacher's image is of 128 x 192"),
        (1.5, lambda item: None, "scale is 1.5, but .* set teacher_scale of the mappers"),
    ],
)
def test_size_that_is_not_the_configs_is_refused(tmp_path, scale, change, line):
    item = two_sizes(tmp_path, 2.0)
    change(item)
    model = pair(resnext_config(), timm_vit_config(), {"scale": scale}, align="resize")
    with pytest.raises(UserError, match=line):
        step(model, [item])


@pytest.mark.parametrize("scale", [0, -1.0])
def test_scale_of_nothing_is_refused(tmp_path, scale):
    with pytest.raises(UserError, match="model.teacher.scale is"):
        pair(resnext_config(), timm_vit_config(), {"scale": scale})
    with pytest.raises(UserError, match="mapper.teacher_scale is"):
        two_sizes(tmp_path, scale)

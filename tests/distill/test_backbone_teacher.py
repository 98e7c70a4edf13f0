"""A frozen backbone, without a detector, as teacher."""

import pytest
import timm
import torch
import toys
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.events import EventStorage
from vit_toys import timm_vit_config

from dfd import DFDHead, DistilledDetector, FrozenBackbone, UserError
from dfd.distill.contract import trunk_of
from dfd.losses import DFDLoss, G2SDLoss, MimicLoss
from dfd.modeling import TimmPyramid, TimmViT

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def vit(pretrained=False, **settings):
    arguments = {"model_name": "vit_tiny_patch16_224", "img_size": 96, "model_args": SMALL}
    return TimmViT(window_size=0, pretrained=pretrained, **arguments, **settings)


def stages():
    return TimmPyramid(model_name="test_resnet")


def teacher_of(backbone, **settings):
    return FrozenBackbone(
        backbone=backbone,
        pixel_mean=[100.0, 110.0, 120.0],
        pixel_std=[50.0, 60.0, 70.0],
        **{"allow_random": True, "precision": "fp32"} | settings,
    )


def distilled(student, teacher, criterion=None, **head):
    head = DFDHead(criterion=criterion or DFDLoss(), **head)
    return DistilledDetector(student=student, teacher=teacher, head=head)


def test_it_sees_the_images_as_its_own_training_did():
    backbone = vit()
    teacher = teacher_of(backbone)
    batch = toys.make_batch(sizes=((64, 96), (80, 64)))
    found = teacher(batch, input_format="BGR")
    assert set(found) == {"last_feat"} and found["last_feat"].shape == (2, 32, 5, 6)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([100.0, 110, 120], [50.0, 60, 70]))
    rgb = torch.zeros(2, 3, 80, 96)  # Padded with zeros after they are normalised.
    for canvas, item in zip(rgb, batch, strict=True):
        image = (item["image"].flip(0) - mean) / std
        canvas[:, : image.shape[1], : image.shape[2]] = image
    with torch.no_grad():
        torch.testing.assert_close(found["last_feat"], backbone(rgb)["last_feat"])


@pytest.mark.parametrize(
    ("student", "teacher", "trunk", "names"),
    [
        ("cnn", vit, False, ["p4"]),
        ("cnn", vit, True, ["res4"]),
        ("vit", vit, True, ["last_feat"]),
        ("cnn", stages, True, ["res2", "res3", "res4", "res5"]),
        ("cnn", stages, False, ["p2", "p3", "p4", "p5"]),
    ],
)
def test_levels_are_paired_by_grid_with_pyramid_or_trunk(student, teacher, trunk, names):
    student = toys.build() if student == "cnn" else instantiate(timm_vit_config(square_pad=96))
    model = distilled(student, teacher_of(teacher()), trunk=trunk).train()
    assert [pair.name for pair in model.head.pairs] == names
    before = {k: v.clone() for k, v in model.teacher.model.state_dict().items()}
    with EventStorage():
        losses = model(toys.make_batch())
    assert {k for k in losses if "dfd" in k} == {f"loss_dfd_{name}" for name in names}
    sum(v for k, v in losses.items() if "dfd" in k).backward()
    own = trunk_of(student.backbone, "student").parameters()
    assert any(p.grad is not None and p.grad.any() for p in own)
    assert all(p.grad is None for p in model.teacher.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.model.state_dict().items())
    assert not any("teacher" in key for key in model.state_dict())
    maps = model.disparity_maps(toys.make_batch())
    assert set(maps) == set(names)


def test_weights_are_strict_and_known_by_a_hash(tmp_path):
    torch.manual_seed(5)
    path = str(tmp_path / "vit.pth")
    whole = timm.create_model("vit_tiny_patch16_224", **SMALL)
    torch.save(whole.state_dict(), path)
    first, again, trained = (
        FrozenBackbone(
            backbone=vit(path, final_norm=True), pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3
        )
        for _ in range(3)
    )
    assert first.weights.path == path and first.weights.sha256 == again.weights.sha256
    with torch.no_grad():
        whole.blocks[1].mlp.fc1.bias += 1e-3
    torch.save(whole.state_dict(), path)
    trained = FrozenBackbone(
        backbone=vit(path, final_norm=True), pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3
    )
    assert trained.weights.sha256 != first.weights.sha256
    state = whole.state_dict()
    del state["blocks.1.mlp.fc1.bias"]
    torch.save(state, path)
    with pytest.raises(UserError, match="blocks.1.mlp.fc1.bias is missing"):
        vit(path, final_norm=True)


def test_a_random_one_is_refused():
    with pytest.raises(UserError, match="random weights, which teach nothing.*pretrained"):
        FrozenBackbone(backbone=vit(), pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3)


def test_one_that_loads_its_weights_by_itself_says_so_and_is_known_by_them():
    hashes = []
    for change in (0.0, 0.0, 1e-3):
        backbone = toys.build(seed=1).backbone
        backbone.pretrained = True
        with torch.no_grad():
            backbone.fpn_output2.bias += change
        weights = teacher_of(backbone, allow_random=False).weights
        assert weights.path == "a FPN's own"
        hashes.append(weights.sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_what_only_detectors_can_do_is_refused():
    teacher = teacher_of(vit())
    with pytest.raises(UserError, match="the teacher is a backbone, which detects nothing"):
        teacher.detect(toys.make_batch(), input_format="BGR")
    with pytest.raises(UserError, match="scores no cells of last_feat"):
        distilled(toys.build(), teacher, G2SDLoss(weight=1.0))
    with pytest.raises(UserError, match="share no stride"):
        patches = TimmViT(
            model_name="vit_tiny_patch16_224", img_size=96, patch_size=12, model_args=SMALL
        )
        distilled(toys.build(), teacher_of(patches), MimicLoss(weight=1.0))
    model = DistilledDetector(
        student=toys.build(),
        teacher=teacher,
        head=DFDHead(criterion=DFDLoss()),
        inherit=["heads"],
    )
    with pytest.raises(UserError, match="nothing of 'heads' can be inherited"):
        model.inherit_from_teacher()


@pytest.mark.parametrize("name", ["dfd_dinov2", "dfd_dinov2_vit"])
def test_recipes_have_the_pixels_of_dinov2_and_its_grid(name):
    from dfd.engine.config.resolve import resolve_pixels, skip_pretrained

    cfg = LazyConfig.load(f"configs/bccd/{name}.py")
    resolve_pixels(cfg)
    teacher = cfg.model.teacher
    assert list(teacher.pixel_mean) == pytest.approx([123.675, 116.28, 103.53])
    assert teacher.input_format == "RGB" and teacher.backbone.pretrained is True
    skip_pretrained(teacher)
    teacher.update(allow_random=True)
    teacher.backbone.model_args = {"depth": 2}
    built = instantiate(teacher)
    (shape,) = built.model.backbone.output_shape().values()
    assert (shape.stride, shape.channels) == (16, 384)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (["res4", "p3"], r"asks for \['p3'\], but the teacher has nothing beside"),
        (["p3"], r"asks for \['p3'\]"),
        ([], "levels is empty"),
    ],
)
def test_level_that_it_has_nothing_for_is_refused(levels, message):
    with pytest.raises(UserError, match=message):
        distilled(toys.build(), teacher_of(vit()), trunk=True, levels=levels)

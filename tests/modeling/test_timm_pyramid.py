"""timm's hierarchical models under an FPN: levels by stride, frozen parts, what is refused."""

import pytest
import timm
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling import FPN
from detectron2.utils.events import EventStorage
from torch import nn
from toys import faster_rcnn_config, make_batch

from dfd import UserError
from dfd.distill.contract import check_fits_square_padding
from dfd.distill.detector import batch_statistics
from dfd.modeling import TimmPyramid
from dfd.modeling.timm_weights import pretrained_files
from dfd.weights.files import file_sha256

TINY_SWIN = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
# One small model of each family, with arguments that make it smaller.
MODELS = {
    "test_resnet": {},
    "test_convnext": {},
    "test_byobnet": {},
    "test_efficientnet": {},
    "mobilenetv3_small_050": {},
    "test_mambaout": {},  # NHWC.
    "swin_tiny_patch4_window7_224": TINY_SWIN,  # NHWC, made for one size.
    "swinv2_tiny_window8_256": TINY_SWIN,
    "pvt_v2_b0": {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
}
LEVELS = {"c2": 4, "c3": 8, "c4": 16, "c5": 32}


def make(name, **settings):
    torch.manual_seed(0)
    return TimmPyramid(model_name=name, model_args=MODELS.get(name), **settings)


def detector(name, square_pad=0, **settings):
    """The toy Faster R-CNN over an FPN over a timm model."""
    model = faster_rcnn_config()
    model.backbone.bottom_up = L(TimmPyramid)(
        model_name=name, model_args=MODELS.get(name), **settings
    )
    model.backbone.in_features = ["c2", "c3", "c4", "c5"]
    model.backbone.square_pad = square_pad
    torch.manual_seed(0)
    return instantiate(model)


@pytest.mark.parametrize("name", MODELS)
def test_detector_over_it_trains_and_evaluates_on_images_of_different_sizes(name):
    model = detector(name).train()
    shapes = model.backbone.bottom_up.output_shape()
    assert {level: shape.stride for level, shape in shapes.items()} == dict(
        c2=4, c3=8, c4=16, c5=32
    )
    batch = make_batch([(70, 90), (64, 100)])
    with EventStorage(0):
        losses = model(batch)
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert len(model.eval()(batch)) == 2


@pytest.mark.parametrize("name", ["test_resnet", "test_mambaout", "swin_tiny_patch4_window7_224"])
def test_levels_are_timms_own_turned_to_channels_first(name):
    backbone = make(name).eval()
    images = torch.randn(2, 3, 64, 96)
    wanted = backbone.body(images)
    for feature, (level, ours) in zip(wanted, backbone(images).items(), strict=True):
        stride = 2 ** int(level[1:])
        assert ours.shape[2:] == (64 // stride, 96 // stride)
        assert ours.shape[1] == backbone.output_shape()[level].channels
        turned = feature if name == "test_resnet" else feature.permute(0, 3, 1, 2)
        torch.testing.assert_close(ours, turned)


def test_out_features_are_the_levels_that_are_asked_for():
    assert list(make("test_resnet", out_features=["c5", "c1"]).output_shape()) == ["c1", "c5"]
    with pytest.raises(UserError, match=r"the levels c2, c3, c4, c5, but out_features is \['c1'\]"):
        make("test_convnext", out_features=["c1"])


@pytest.mark.parametrize(
    "name, frozen, trained",
    [
        ("test_resnet", ("conv1", "bn1", "layer1"), ("layer2", "layer3", "layer4")),
        ("test_efficientnet", ("conv_stem", "bn1", "blocks.0", "blocks.1"), ("blocks.",)),
        ("test_convnext", ("stem_", "stages_0"), ("stages_",)),
    ],
)
def test_freeze_at_2_freezes_all_up_to_c2_and_its_norms(name, frozen, trained):
    backbone = make(name, freeze_at=2).train()
    for key, parameter in backbone.body.named_parameters():
        assert key.startswith((*frozen, *trained)), key
        assert parameter.requires_grad != key.startswith(frozen), key
    before = {k: v.clone() for k, v in backbone.body.state_dict().items() if k.startswith(frozen)}
    backbone(torch.randn(2, 3, 64, 64))
    after = backbone.body.state_dict()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, msg=f"{key} has moved")
    if name == "test_resnet":
        # In eval mode it computes what the norms did that it took the place of.
        images = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(backbone.eval()(images)["c2"], make(name).eval()(images)["c2"])


def test_freeze_at_a_level_that_is_not_put_out():
    """RetinaNet's c3 to c5 with c2 frozen, as Detectron2's ResNet has it."""
    backbone = make("test_resnet", out_features=["c3", "c4", "c5"], freeze_at=2)
    trained = {n.partition(".")[0] for n, p in backbone.body.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    with pytest.raises(UserError, match="freeze_at cannot be set, for timm does not tell where"):
        TimmPyramid(model_name="mvitv2_tiny", img_size=64, freeze_at=2)


def test_windows_of_a_swin_are_shifted_in_every_stage():
    """timm shifts none where the size that it was trained at has one window."""
    for name in ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"):
        arguments = TINY_SWIN | {"depths": (2, 2, 2, 2)}
        backbone = TimmPyramid(model_name=name, model_args=arguments)
        shifts = [m.shift_size for m in backbone.modules() if hasattr(m, "shift_size")]
        half = 3 if name.startswith("swin_") else 4
        assert shifts == [(0, 0), (half, half)] * 4


def test_pictures_use_the_batchs_statistics_in_timms_norms_too():
    backbone = make("test_efficientnet").eval()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    images = torch.randn(4, 3, 64, 64) * 5 + 3
    with batch_statistics(backbone):
        norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and all(norm.training for norm in norms)
        backbone(images)
    assert not any(norm.training for norm in norms)
    torch.testing.assert_close(backbone.state_dict(), before)


def test_frozen_norms_are_constant_and_compute_the_same():
    frozen, plain = make("test_efficientnet", norm="FrozenBN"), make("test_efficientnet").eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(frozen.train()(images), plain(images))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    synced = make("test_resnet", norm="SyncBN")
    assert any(isinstance(m, nn.SyncBatchNorm) for m in synced.modules())
    with pytest.raises(UserError, match="norm is 'FrozenBN', but it has no batch norms"):
        make("test_convnext", norm="FrozenBN")


def test_hybrid_of_one_size_needs_it_told_and_pads_to_it():
    with pytest.raises(UserError, match="fails on an image of 96 x 160 pixels.*set img_size"):
        make("test_coatnet")
    with pytest.raises(UserError, match="64 x 128 pixels, but it was made for 96 x 96.*square_pad"):
        make("test_coatnet", img_size=96)(torch.zeros(1, 3, 64, 128))
    model = detector("test_coatnet", img_size=96, square_pad=96).train()
    with EventStorage(0):
        sum(model(make_batch([(70, 90), (64, 60)])).values()).backward()
    assert len(model.eval()(make_batch([(70, 90)]))) == 1
    with pytest.raises(UserError, match="larger than the square of 96"):
        check_fits_square_padding(model, make_batch([(64, 100)]), "student")


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"model_name": "resnet_18"}, "timm .* has no model 'resnet_18'"),
        ({"model_name": "test_vit"}, r"strides of its features are \[16, 16, 16\].*take TimmViT"),
        ({"model_name": "test_resnet", "norm": "LN"}, "norm is 'LN'; it must be one of"),
        ({"model_name": "test_resnet", "freeze_at": 7}, "freeze_at is 7; it must be 0, or"),
        ({"model_name": "test_resnet", "model_args": {"depht": 3}}, "cannot be made: .*depht"),
        ({"model_name": "test_resnet", "img_size": 64}, "cannot be made: .*img_size"),
        # Below its own size it would run, and read its positions elsewhere than it was trained.
        ({"model_name": "mvitv2_tiny"}, "on an image of 256 x 288 pixels .*: .* set img_size"),
    ],
)
def test_unsuitable_model_or_setting_is_refused_with_the_reason(settings, line):
    with pytest.raises(UserError, match=line):
        TimmPyramid(**settings)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_weights_of_a_timm_file_are_loaded_whole_or_refused(name, tmp_path):
    torch.manual_seed(3)
    plain = timm.create_model(name)
    path = tmp_path / "weights.pth"
    torch.save(plain.state_dict(), path)
    ours = make(name, pretrained=str(path)).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = plain.eval().forward_intermediates(images, intermediates_only=True)
    torch.testing.assert_close(list(ours(images).values()), expected[-4:])
    state = plain.state_dict()
    key = next(k for k in state if "blocks.1" in k or "layer2" in k or "stages.1" in k)
    torch.save({k: v for k, v in state.items() if k != key}, path)
    with pytest.raises(UserError, match=f"does not fit.*{key}"):
        make(name, pretrained=str(path))


def test_whose_weights_a_trunk_has_is_told(tmp_path):
    path = str(tmp_path / "weights.pth")
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    named, foreign, other = nn.Module(), nn.Module(), nn.Module()
    named.model_name, named.pretrained = "resnet18.a1_in1k", True
    # Of nobody here: what it stands for is not known, and no reason to refuse a run.
    foreign.model_name, foreign.pretrained = "resnet34", "imagenet"
    other.model_name, other.pretrained = "resnet34", object()
    parts = [make("test_resnet", pretrained=path), named, foreign, other, make("test_convnext")]
    assert pretrained_files(nn.ModuleList(parts)) == [
        {"path": path, "sha256": file_sha256(path)},
        {"path": "resnet18.a1_in1k", "sha256": ""},
    ]


def test_fpn_names_its_levels_by_stride():
    backbone = FPN(make("test_convnext"), ["c2", "c3", "c4", "c5"], 8)
    assert list(backbone.output_shape()) == ["p2", "p3", "p4", "p5"]

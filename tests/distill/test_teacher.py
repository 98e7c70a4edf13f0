import pickle

import pytest
import torch
from detectron2.layers import Conv2d, get_norm
from timm.layers import DropPath
from torch import nn
from toys import build, make_batch

from dfd import FrozenTeacher, UserError
from dfd.distill.precision import faster_copy, resolve_precision
from dfd.modeling import YOLOX, TimmPyramid


def teacher_of(model=None, **kwargs):
    kwargs.setdefault("precision", "fp32")
    return FrozenTeacher(model=model or build(seed=1), allow_random=True, **kwargs)


def test_random_teacher_is_refused():
    with pytest.raises(UserError, match="model.teacher.checkpoint is empty"):
        FrozenTeacher(model=build())


def test_random_teacher_only_where_the_config_says_so():
    assert teacher_of().weights is None


@pytest.mark.parametrize("kind", ["pth", "bare_pth", "zoo_pkl"])
def test_teacher_gets_every_weight_of_its_checkpoint(tmp_path, kind):
    trained = build(seed=1)
    path = str(tmp_path / ("model.pkl" if kind == "zoo_pkl" else "model.pth"))
    if kind == "zoo_pkl":
        write_zoo_pickle(trained, path)
    else:
        state = trained.state_dict()
        torch.save(state if kind == "bare_pth" else {"model": state, "iteration": 7}, path)
    teacher = FrozenTeacher(model=build(seed=2), checkpoint=path)
    for key, value in trained.state_dict().items():
        torch.testing.assert_close(teacher.model.state_dict()[key], value)
    assert len(teacher.weights.sha256) == 64


def write_zoo_pickle(model, path):
    """As the model zoo's files: numpy arrays, old extra keys, no batch-norm counters."""
    arrays = {
        key: value.numpy()
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    arrays["proposal_generator.anchor_generator.cell_anchors.0"] = torch.zeros(3, 4).numpy()
    arrays["pixel_mean"] = model.pixel_mean.numpy()
    arrays["pixel_std"] = model.pixel_std.numpy()
    with open(path, "wb") as f:
        pickle.dump({"model": arrays, "__author__": "Detectron2 Model Zoo"}, f)


def missing(state):
    del state["backbone.fpn_output3.weight"]
    return "backbone.fpn_output3.weight is missing"


def missing_statistics(state):
    del state["backbone.bottom_up.stem.conv1.norm.running_var"]
    return "backbone.bottom_up.stem.conv1.norm.running_var is missing"


def unexpected(state):
    state["backbone.fpn_output9.weight"] = torch.zeros(1)
    return "backbone.fpn_output9.weight is unexpected"


def misshaped(state):
    state["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(7, 16)
    return "roi_heads.box_predictor.cls_score.weight has shape (7, 16), the model (4, 16)"


def diverged(state):
    state["backbone.fpn_output4.weight"] = torch.full_like(
        state["backbone.fpn_output4.weight"], torch.nan
    )
    return "backbone.fpn_output4.weight holds NaN: its training diverged"


def rounded(state):
    state["backbone.fpn_output4.weight"] = state["backbone.fpn_output4.weight"].int()
    return "backbone.fpn_output4.weight is of torch.int32, no floating-point numbers"


@pytest.mark.parametrize(
    "damage", [missing, missing_statistics, unexpected, misshaped, diverged, rounded]
)
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_partly_random_teacher_is_refused_by_key(tmp_path, damage, norm):
    from detectron2.config import instantiate
    from toys import faster_rcnn_config

    model = instantiate(faster_rcnn_config(norm=norm))
    state = dict(model.state_dict())
    message = damage(state)
    torch.save({"model": state}, tmp_path / "teacher.pth")
    with pytest.raises(UserError) as error:
        FrozenTeacher(model=model, checkpoint=str(tmp_path / "teacher.pth"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_pixel_mean_of_the_checkpoint_contradicts_the_config(tmp_path):
    model = build()
    state = model.state_dict() | {"pixel_mean": torch.tensor([123.675, 116.28, 103.53])}
    torch.save({"model": state}, tmp_path / "teacher.pth")
    with pytest.raises(UserError, match="was trained with pixel_mean"):
        FrozenTeacher(model=model, checkpoint=str(tmp_path / "teacher.pth"))


@pytest.mark.parametrize("part", ["model.", "model.student."])
def test_pixels_of_the_training_are_those_of_the_config(tmp_path, part):
    """The statistics are in no checkpoint of this project: its settings tell them."""
    path = str(tmp_path / "teacher.pth")
    model = build()
    model.pixel_mean = torch.tensor([100.0, 110.0, 120.0])[:, None, None]
    right = {f"{part}pixel_mean.{i}": str(v.item()) for i, v in enumerate(model.pixel_mean)}
    right |= {f"{part}pixel_std.{i}": str(v.item()) for i, v in enumerate(model.pixel_std)}
    right[f"{part}input_format"] = model.input_format

    def teacher(changed=None, **settings):
        torch.save({"model": model.state_dict(), "settings": right | (changed or {})}, path)
        return FrozenTeacher(model=model, checkpoint=path, **settings)

    teacher()
    teacher({"model.teacher.model.pixel_mean.0": "0.0"})  # Of its own teacher.
    with pytest.raises(UserError, match=r"was trained with pixel_mean \[0.0, "):
        teacher({f"{part}pixel_mean.0": "0.0"})
    with pytest.raises(UserError, match="was trained with pixel_std"):
        teacher({f"{part}pixel_std.2": "57.0"})
    with pytest.raises(UserError, match="with input_format RGB, but the config has BGR"):
        teacher({f"{part}input_format": "RGB"})
    teacher({f"{part}input_format": "RGB"}, input_format="RGB")
    with pytest.raises(UserError, match="with input_format BGR, but the config has RGB"):
        teacher(input_format="RGB")
    # A distilled student was trained with what the whole was given.
    teacher({"model.input_format": "RGB"}, input_format="RGB")
    with pytest.raises(UserError, match="with input_format RGB, but the config has BGR"):
        teacher({"model.input_format": "RGB"})
    # A detector of other channels, against itself and others.
    model.pixel_mean = torch.arange(4.0)[:, None, None]
    four = {f"{part}pixel_mean.{i}": str(float(i)) for i in range(4)}
    teacher(four)
    with pytest.raises(UserError, match="was trained with pixel_mean"):
        teacher(four | {f"{part}pixel_mean.3": "9"})


@pytest.mark.parametrize("content", [b"", b"not weights"])
def test_damaged_weight_file_is_named(tmp_path, content):
    path = tmp_path / "teacher.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="teacher.pth is not a readable weight file"):
        FrozenTeacher(model=build(), checkpoint=str(path))


def test_absent_weight_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        FrozenTeacher(model=build(), checkpoint=str(tmp_path / "absent.pth"))


def test_imagenet_backbone_is_no_teacher(tmp_path):
    with open(tmp_path / "R-50.pkl", "wb") as f:
        pickle.dump({"model": {}, "__author__": "torchvision", "matching_heuristics": True}, f)
    with pytest.raises(UserError, match="heuristics"):
        FrozenTeacher(model=build(), checkpoint=str(tmp_path / "R-50.pkl"))


@pytest.mark.parametrize("batch_format", ["BGR", "RGB"])
@pytest.mark.parametrize("teacher_format", ["BGR", "RGB"])
def test_teacher_mean_and_std_in_the_wrong_channel_order(batch_format, teacher_format):
    """The teacher sees what its own preprocessing makes of an image in its own order."""
    model = build()
    model.pixel_mean = torch.tensor([10.0, 60, 200]).view(3, 1, 1)
    model.pixel_std = torch.tensor([1.0, 5, 50]).view(3, 1, 1)
    model.input_format = teacher_format
    teacher = teacher_of(model)
    rgb = make_batch()
    batch = rgb if batch_format == "RGB" else [{"image": x["image"].flip(0)} for x in rgb]
    own = rgb if teacher_format == "RGB" else [{"image": x["image"].flip(0)} for x in rgb]
    found = teacher.network_input(teacher.own_images(batch, batch_format))
    torch.testing.assert_close(found, model.preprocess_image(own).tensor)


@pytest.mark.parametrize("unit", [1, 255])
@pytest.mark.parametrize(
    ("key", "rgb"),
    [("pixel_mean", [123.675, 116.28, 103.53]), ("pixel_std", [58.395, 57.12, 57.375])],
)
def test_imagenet_statistics_in_the_other_order_are_refused(key, rgb, unit):
    model = build()
    model.pixel_mean = torch.zeros(3, 1, 1)
    setattr(model, key, torch.tensor(rgb).view(3, 1, 1) / unit)
    with pytest.raises(UserError, match=f"teacher takes BGR images, but its {key} .* RGB"):
        teacher_of(model)
    assert teacher_of(model, input_format="RGB").input_format == "RGB"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_teacher_not_in_eval_mode_would_move_its_statistics_and_drop_paths(precision):
    model = build()
    model.backbone.bottom_up.res3.add_module("drop_path", DropPath(0.5))
    teacher = teacher_of(model, precision=precision)
    assert not any(module.training for module in model.modules())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()  # As a hook might.
    batch = make_batch()
    first = teacher(batch, input_format="BGR")
    second = teacher(batch, input_format="BGR")
    for name in first:
        torch.testing.assert_close(first[name], second[name])
        assert not first[name].requires_grad
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_no_teacher_weight_is_trainable():
    assert not any(p.requires_grad for p in teacher_of().model.parameters())


def test_image_larger_than_the_square_padding_is_refused():
    model = build()
    model.backbone._square_pad = 64
    with pytest.raises(UserError, match="64 x 96 pixels .* larger than the square of 64"):
        teacher_of(model)(make_batch(), input_format="BGR")


def statistics(model, seed=0):
    """Give batch norms the statistics of a trained network."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
    return model


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_low_precision_pass_is_the_fp32_pass(kind):
    batch = make_batch()
    exact = teacher_of(statistics(build(kind)))(batch, input_format="BGR")
    teacher = teacher_of(statistics(build(kind)), precision="bf16")
    for name, low in teacher(batch, input_format="BGR").items():
        assert low.dtype == torch.bfloat16
        cosine = torch.cosine_similarity(low.float().flatten(), exact[name].flatten(), dim=0)
        assert cosine > 0.999, (name, cosine)


def test_folded_norms_compute_the_same():
    backbone = statistics(build()).backbone.eval()
    folded = faster_copy(backbone, torch.float32)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for name, expected in backbone(x).items():
            torch.testing.assert_close(folded(x)[name], expected, rtol=1e-4, atol=1e-4)


def test_folded_norms_of_a_yolox_compute_the_same():
    torch.manual_seed(0)
    backbone = YOLOX(depth=0.33, width=0.125, num_classes=3).backbone.eval()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    folded = faster_copy(backbone, torch.float32)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for name, expected in backbone(x).items():
            torch.testing.assert_close(folded(x)[name], expected, rtol=1e-3, atol=1e-4)


class NormFirst(nn.Module):
    """A user's, with the names of YOLOX's and another order."""

    def __init__(self):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        nn.init.uniform_(self.bn.running_mean, 1, 2)
        nn.init.uniform_(self.bn.running_var, 2, 3)

    def forward(self, x):
        return self.conv(self.bn(x).relu())


def test_a_norm_before_its_convolution_is_not_folded():
    torch.manual_seed(0)
    network, x = NormFirst().eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(faster_copy(network, torch.float32)(x), network(x))


class Standardised(Conv2d):
    """A user's, whose weights are standardised in every forward."""

    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return self.norm(nn.functional.conv2d(x, weight, None, 1, 1))


class Clamped(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).clamp(min=0)


def _of_unusual_layers():
    yield Standardised(3, 8, 3, padding=1, bias=False, norm=nn.BatchNorm2d(8))
    yield Conv2d(3, 8, 3, norm=Clamped(8))
    yield Conv2d(3, 8, 3, norm=nn.BatchNorm2d(8, affine=False))
    yield Conv2d(3, 8, 3, norm=nn.BatchNorm2d(8, track_running_stats=False))
    yield nn.utils.parametrizations.weight_norm(Conv2d(3, 8, 3, norm=nn.BatchNorm2d(8)))
    hooked = Conv2d(3, 8, 3, norm=nn.BatchNorm2d(8))
    hooked.norm.register_forward_hook(lambda module, args, output: output + 1)
    yield hooked
    hooked = Conv2d(3, 8, 3, norm=nn.BatchNorm2d(8))
    hooked.norm.register_forward_pre_hook(lambda module, args: (args[0].clamp(min=0),))
    yield hooked
    changed = Conv2d(3, 8, 3, norm=nn.BatchNorm2d(8))
    changed.norm.forward = lambda x: x.clamp(min=0)
    yield changed


@pytest.mark.parametrize("layer", range(8))
def test_layers_of_other_forwards_are_not_folded(layer):
    torch.manual_seed(0)
    network, x = list(_of_unusual_layers())[layer], torch.randn(2, 3, 8, 8)
    for _ in range(20):  # Statistics of its norm.
        network(3 * x + 1)
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(faster_copy(network, torch.float32)(x), network(x))


def test_norms_with_an_activation_within_are_no_plain_ones():
    """timm's, which would lose it."""
    trunk = TimmPyramid(model_name="test_efficientnet").eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for name, expected in trunk(x).items():
            found = faster_copy(trunk, torch.float32)(x)[name]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_pass_in_fp32_is_the_detector_s_own_but_for_rounding():
    teacher = teacher_of(statistics(build()), precision="fp32")
    batch = make_batch()
    images = teacher.network_input(batch)
    found = teacher(batch, input_format="BGR")
    with torch.no_grad():
        for name, expected in teacher.model.backbone(images).items():
            torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", ["GN", "SyncBN"])
def test_faster_copy_rounds_no_norm(norm):
    conv = Conv2d(3, 32, 3, norm=get_norm(norm, 32))
    conv.norm.weight.data += 1e-3  # Which bf16 cannot hold.
    copy = faster_copy(nn.Sequential(conv), torch.bfloat16)[0]
    assert copy.weight.dtype == torch.bfloat16
    if norm == "GN":
        torch.testing.assert_close(copy.norm.weight, conv.norm.weight, rtol=0, atol=0)
    else:
        assert copy.norm is None


def test_trunk_is_made_once_for_a_device(monkeypatch):
    teacher = teacher_of(precision="bf16")
    made = []
    monkeypatch.setattr(
        "dfd.distill.teacher.faster_copy",
        lambda *a: made.append(a) or faster_copy(*a),
    )
    for _ in range(2):
        teacher(make_batch(), input_format="BGR", device="cpu")
    assert len(made) == 1


def test_low_precision_leaves_the_teachers_own_weights_alone():
    model = build()
    teacher_of(model, precision="bf16")(make_batch(), input_format="BGR")
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_fp16_needs_cuda():
    with pytest.raises(UserError, match="needs CUDA"):
        resolve_precision("fp16", torch.device("cpu"))
    assert resolve_precision("fp16", torch.device("cuda")) == torch.float16
    assert resolve_precision("fp32", torch.device("cpu")) == torch.float32


def without_argument(answer):
    """``torch.cuda.is_bf16_supported`` of an older torch."""
    return lambda: answer


def with_argument(answer):
    """A newer one, which counts emulation unless it is told not to."""
    return lambda including_emulation=True: True if including_emulation else answer


@pytest.mark.parametrize(
    ("supported", "capability", "expected"),
    [
        (with_argument(True), (8, 0), torch.bfloat16),
        (with_argument(False), (7, 5), torch.float32),
        (without_argument(True), (8, 6), torch.bfloat16),
        (without_argument(True), (7, 5), torch.float32),  # By emulation.
        (without_argument(False), (6, 1), torch.float32),
    ],
)
def test_auto_is_bf16_only_where_cuda_has_units_and_never_fp16(
    monkeypatch, supported, capability, expected
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert resolve_precision("auto", torch.device("cuda")) == expected


def test_modes_are_not_set_in_every_pass(monkeypatch):
    teacher = teacher_of()
    batch = make_batch()
    teacher(batch, input_format="BGR")
    set_modes = []
    monkeypatch.setattr(nn.Module, "train", lambda self, mode=True: set_modes.append(mode) or self)
    teacher(batch, input_format="BGR")
    assert not set_modes
    teacher._part.backbone.bottom_up.training = True
    teacher(batch, input_format="BGR")
    assert set_modes == [False]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_what_a_pass_needs_is_on_its_device(precision):
    """On a device without memory: torch's meta device."""
    model = build()
    teacher = teacher_of(model, precision=precision)
    teacher._make_part(torch.device("meta"))
    there = {name for name, p in model.named_parameters() if p.is_meta}
    backbone = {name for name, _ in model.named_parameters() if name.startswith("backbone.")}
    assert there == (backbone if precision == "fp32" else set())
    assert all(p.is_meta for p in teacher._part.parameters())
    assert teacher.device.type == model.pixel_std.device.type == "meta"


def test_checkpoint_of_this_project_brings_its_class_names(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": build().state_dict(), "class_names": ["a", "b", "c"]}, path)
    assert FrozenTeacher(model=build(), checkpoint=str(path)).class_names == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (dict(precision="fp8"), "model.teacher.precision is 'fp8'"),
        (dict(input_format="GBR"), "input_format is 'GBR'"),
        (dict(model=nn.Linear(1, 1)), "without a backbone"),
    ],
)
def test_bad_setting_is_named(settings, named):
    with pytest.raises(UserError) as error:
        teacher_of(**settings)
    assert named in str(error.value)



"""Groups of the optimizer, by name."""

from pathlib import Path

import pytest
import timm.layers
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import CycleBatchNormList, NaiveSyncBatchNorm
from detectron2.layers.batch_norm import LayerNorm
from detectron2.modeling import SimpleFeaturePyramid, ViT
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver.build import get_default_optimizer_params
from omegaconf import OmegaConf
from timm.layers.grn import GlobalResponseNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toys import build, faster_rcnn_config

from dfd import DFDHead, DistilledDetector, FrozenTeacher, UserError
from dfd.engine.build import build_optimizer
from dfd.engine.optim import depth_of, describe_groups, parameter_groups
from dfd.losses import DFDLoss

LAYERS = 3
OPTIMIZERS = Path(__file__).parents[2] / "configs/common/optim.py"


def vit_student():
    """Faster R-CNN over a ViTDet of three blocks, one of them with a residual convolution."""
    model = faster_rcnn_config()
    model.backbone = L(SimpleFeaturePyramid)(
        net=L(ViT)(
            img_size=64,
            embed_dim=16,
            depth=LAYERS,
            num_heads=2,
            residual_block_indexes=[1],
            use_rel_pos=True,
        ),
        in_feature="last_feat",
        out_channels=8,
        scale_factors=(4.0, 2.0, 1.0, 0.5),
        top_block=L(LastLevelMaxPool)(),
        norm="LN",
        square_pad=96,
    )
    return instantiate(model)


def distilled(student):
    """With a head that has adapters and criteria of its own."""
    teacher = FrozenTeacher(model=build(seed=1), allow_random=True, precision="fp32")
    head = DFDHead(criterion=DFDLoss(lenient="context"), adapter="conv1x1")
    return DistilledDetector(student=student, teacher=teacher, head=head)


def groups_of(model, base_lr=0.1, weight_decay=0.05, **kwargs):
    return parameter_groups(model=model, base_lr=base_lr, weight_decay=weight_decay, **kwargs)


def by_name(groups):
    """Parameter name to (rate, decay)."""
    return {n: (g["lr"], g["weight_decay"]) for g in groups for n in g["param_names"]}


@pytest.fixture(scope="module")
def vit():
    return vit_student()


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("backbone.net.pos_embed", 0),
        ("backbone.net.patch_embed.proj.weight", 0),
        ("backbone.net.blocks.0.norm1.weight", 1),
        ("backbone.net.blocks.3.attn.qkv.weight", 4),
        ("backbone.net.blocks.11.mlp.fc2.bias", 12),
        ("backbone.net.blocks.11.residual.conv1.weight", 13),
        ("backbone.net.norm.weight", 13),
        ("backbone.simfp_2.0.weight", 13),
        ("proposal_generator.rpn_head.conv.weight", 13),
        ("roi_heads.box_head.fc1.weight", 13),
    ],
)
def test_depth_is_detectron2s(name, depth):
    assert depth_of(name, 12) == depth
    rate = get_vit_lr_decay_rate(name, lr_decay_rate=0.7, num_layers=12)
    assert 0.7 ** (13 - depth) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("backbone.net.cls_token", 0),
        ("backbone.net.reg_token", 0),
        ("backbone.net.norm_pre.weight", 0),
        ("backbone.net.blocks.2.ls1.gamma", 3),
        ("backbone.net.fc_norm.weight", 13),
        # The third block of a stage, not of the network.
        ("backbone.bottom_up.layers.0.blocks.2.attn.qkv.weight", 13),
        ("backbone.stages.1.blocks.2.conv_dw.weight", 13),
    ],
)
def test_depth_where_detectron2s_is_not_right(name, depth):
    assert depth_of(name, 12) == depth


def test_depth_agrees_with_detectron2_on_every_parameter_of_a_vitdet(vit):
    rates = by_name(groups_of(vit, lr_decay=0.7))
    assert set(rates) == {name for name, _ in vit.named_parameters()}
    for name, (rate, _) in rates.items():
        assert rate == pytest.approx(0.1 * get_vit_lr_decay_rate(name, 0.7, LAYERS)), name
    assert len({rate for rate, _ in rates.values()}) == LAYERS + 2


@pytest.mark.parametrize("prefix", ["student.", "module.", "module.student."])
def test_wrapped_names_have_no_depth(prefix):
    with pytest.raises(ValueError, match="not the detector's own name"):
        depth_of(f"{prefix}backbone.net.blocks.3.attn.qkv.weight", 12)


RULES = dict(
    lr_decay=0.7,
    weight_decay_1d=0.0,
    overrides={"*pos_embed": {"weight_decay": 0.0}, "backbone.net.*": {"lr_multiplier": 0.5}},
)


def test_layer_decay_lost_under_the_student_prefix(vit):
    """A distilled student's groups are the bare student's, whatever the rule goes by."""
    bare = groups_of(vit, **RULES)
    assert by_name(bare)["backbone.net.blocks.1.attn.qkv.weight"] == pytest.approx(
        (0.1 * 0.5 * 0.7**2, 0.05)
    )
    groups = groups_of(distilled(vit), **RULES)
    own = [group for group in groups if group["name"].startswith("detector")]
    assert [group["name"] for group in own] == [group["name"] for group in bare]
    assert by_name(own) == by_name(bare)
    for group, other in zip(own, bare, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in other["params"]]


def test_groups_are_the_same_under_distributed_data_parallel(vit, tmp_path):
    model = distilled(vit)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        groups = groups_of(DistributedDataParallel(model), **RULES)
    finally:
        torch.distributed.destroy_process_group()
    assert by_name(groups) == by_name(groups_of(model, **RULES))


def test_head_has_groups_of_its_own():
    model = distilled(build())
    groups = groups_of(model, head_lr_multiplier=3.0, head_weight_decay=0.01, weight_decay_bias=0.0)
    head = [group for group in groups if group["name"].startswith("distillation")]
    expected = {f"head.{name}" for name, _ in model.head.named_parameters()}
    assert set(by_name(head)) == expected
    assert "head.adapters.p3.weight" in expected
    assert by_name(head)["head.adapters.p3.weight"] == pytest.approx((0.3, 0.01))
    assert by_name(head)["head.adapters.p3.bias"] == pytest.approx((0.3, 0.0))
    rest = [group for group in groups if group["name"].startswith("detector")]
    assert set(by_name(rest)) == {name for name, _ in model.student.named_parameters()}
    assert len(head) + len(rest) == len(groups)


@pytest.mark.parametrize("kind", ["faster_rcnn", "cascade_rcnn", "retinanet", "fcos"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_groups_of_a_cnn_are_detectron2s(kind, name):
    model = build(kind)
    cfg = OmegaConf.create({"optimizer": LazyConfig.load(str(OPTIMIZERS))[name]})
    cfg.optimizer.lr = 0.3  # As an override does.
    optimizer = build_optimizer(cfg, model)
    names = {id(p): n for n, p in model.named_parameters()}

    def settings(optimizer):
        return {
            names[id(p)]: (group["lr"], group["weight_decay"])
            for group in optimizer.param_groups
            for p in group["params"]
        }

    cls = type(optimizer)
    theirs = get_default_optimizer_params(model, weight_decay_norm=0.0)
    theirs = cls(theirs, lr=0.3, weight_decay=cfg.optimizer.weight_decay)
    assert settings(optimizer) == settings(theirs)
    assert len(optimizer.param_groups) == 2


def test_yolox_optimizer_decays_weights_alone():
    model = build("fcos")
    cfg = OmegaConf.create({"optimizer": LazyConfig.load(str(OPTIMIZERS)).NesterovSGD})
    optimizer = build_optimizer(cfg, model)
    assert optimizer.defaults["nesterov"] and optimizer.defaults["momentum"] == 0.9
    decays = {
        name: group["weight_decay"]
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert set(decays) == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert decays[name] == (5e-4 if parameter.ndim == 4 else 0), name
    assert {parameter.ndim for parameter in model.parameters()} >= {1, 4}


def one_of(name):
    return lambda: getattr(timm.layers, name)(8)


class NormedLinear(nn.Linear):
    """Normalises its weight; a layer of many detectors."""


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm2d(8),
        lambda: nn.SyncBatchNorm(8),
        lambda: nn.GroupNorm(2, 8),
        lambda: nn.LayerNorm((8, 4, 4)),
        lambda: nn.RMSNorm(8),
        lambda: LayerNorm(8),
        lambda: NaiveSyncBatchNorm(8),
        lambda: CycleBatchNormList(2, num_features=8),
        one_of("LayerNorm2d"),
        one_of("LayerNormFp32"),
        one_of("RmsNorm"),
        one_of("RmsNorm2d"),
        one_of("SimpleNorm2d"),
        one_of("GroupNorm1"),
        one_of("BatchNormAct2d"),
        one_of("LayerNormAct2d"),
        one_of("EvoNorm2dB0"),
        one_of("FilterResponseNormTlu2d"),
        lambda: GlobalResponseNorm(8),
    ],
)
def test_norms_are_not_decayed(make):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), make())
    decays = {name: decay for name, (_, decay) in by_name(groups_of(model)).items()}
    assert decays.pop("0.weight") == decays.pop("0.bias") == 0.05
    assert decays and set(decays.values()) == {0.0}


def test_a_layer_that_normalises_its_weight_is_decayed():
    assert by_name(groups_of(NormedLinear(4, 4)))["weight"] == (0.1, 0.05)


def test_rules_of_a_timm_vit():
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.net = VisionTransformer(
        img_size=32,
        patch_size=16,
        embed_dim=16,
        depth=LAYERS,
        num_heads=2,
        reg_tokens=2,
        init_values=1e-5,
        pre_norm=True,
        num_classes=0,
    )
    found = by_name(groups_of(model, lr_decay=0.5, weight_decay_1d=0.0, num_layers=LAYERS))
    for name, expected in {
        "cls_token": (0.1 * 0.5**4, 0.05),
        "reg_token": (0.1 * 0.5**4, 0.05),
        "pos_embed": (0.1 * 0.5**4, 0.05),
        "patch_embed.proj.weight": (0.1 * 0.5**4, 0.05),
        "norm_pre.weight": (0.1 * 0.5**4, 0.0),
        "blocks.0.attn.qkv.weight": (0.1 * 0.5**3, 0.05),
        "blocks.0.attn.qkv.bias": (0.1 * 0.5**3, 0.0),
        "blocks.2.ls1.gamma": (0.1 * 0.5, 0.0),
        "blocks.2.norm2.weight": (0.1 * 0.5, 0.0),
        "norm.weight": (0.1, 0.0),
    }.items():
        assert found[f"backbone.net.{name}"] == pytest.approx(expected), name


def test_few_groups_of_unique_names_in_the_same_order_every_time(vit):
    def summary(groups):
        return [(g["name"], g["lr"], g["weight_decay"], g["param_names"]) for g in groups]

    groups = groups_of(vit, **RULES)
    kinds = [(group["lr"], group["weight_decay"]) for group in groups]
    assert len({group["name"] for group in groups}) == len(groups)
    # Those of the detector's last layer at half the rate and of the rest, decayed and not.
    assert len(groups) == len(set(kinds)) == 2 * (LAYERS + 3)
    assert summary(groups) == summary(groups_of(vit_student(), **RULES))


def test_shared_and_frozen_parameters(vit):
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    model["c"].requires_grad_(False)
    assert list(by_name(groups_of(model))) == ["a.weight", "a.bias", "b.bias"]


def test_the_last_pattern_wins():
    patterns = {"*": {"weight_decay": 0.2, "lr_multiplier": 2.0}, "0.*": {"weight_decay": 0.3}}
    found = by_name(groups_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), overrides=patterns))
    assert found["0.weight"] == (0.2, 0.3)
    assert found["1.bias"] == (0.2, 0.2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"overrides": {"pos_embed": {"weight_decay": 0}}}, "no parameter .* 'pos_embed'"),
        ({"overrides": {"*bias": {"lr": 1}}}, "must give lr_multiplier or weight_decay"),
        ({"overrides": {"*bias": 0}}, "must give lr_multiplier or weight_decay"),
        ({"lr_decay": 1.5}, r"lr_decay is 1.5; it must be in \(0, 1\]"),
        ({"lr_decay": 0.7, "num_layers": 12}, "num_layers is 12, but the backbone has 3 blocks"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(vit, kwargs, message):
    with pytest.raises(UserError, match=message):
        groups_of(vit, **kwargs)


def test_layer_decay_of_a_cnn_is_refused():
    with pytest.raises(UserError, match="layer decay is for plain ViTs"):
        groups_of(build(), lr_decay=0.7)


def test_groups_are_described():
    model = distilled(build())
    optimizer = torch.optim.SGD(groups_of(model, head_lr_multiplier=2.0), lr=0.1)
    for group in optimizer.param_groups:
        group["initial_lr"], group["lr"] = group["lr"], 0.0  # As a schedule does.
    head, _, *rows = describe_groups(optimizer).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [cell.strip() for cell in head.strip("|").split("|")][:2] == ["group", "tensors"]
    assert [row[0] for row in cells] == [
        "detector/decay",
        "detector/no_decay",
        "distillation/lr_x2.0/decay",
    ]
    assert [float(row[3]) for row in cells] == [0.1, 0.1, 0.2]
    assert [float(row[4]) for row in cells] == [0.05, 0.0, 0.05]
    total = sum(p.numel() for p in model.parameters())
    assert sum(int(row[2].replace(",", "")) for row in cells) == total
    assert cells[2][5] == "head.adapters.p2.weight, head.adapters.p2.bias, ..."


def test_groups_of_other_functions_are_described_too():
    text = describe_groups(torch.optim.Adam(nn.Linear(2, 2).parameters(), lr=0.5))
    assert text.splitlines()[2].split("|")[1].strip() == "0"

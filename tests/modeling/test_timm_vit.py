"""TimmViT equals timm where all blocks are global, and Detectron2's ViT where both are windowed."""

import pytest
import timm
import torch
from detectron2.modeling import ViT
from detectron2.modeling.backbone.utils import get_abs_pos
from timm.models.vision_transformer import VisionTransformer

from dfd import UserError
from dfd.modeling import SimplePyramid, TimmViT, timm_vit

# A model for each kind of structure; made small by SMALL.
FAMILIES = {
    "class token": "vit_tiny_patch16_224",
    "registers, no class token": "test_vit2",
    "RMS norm, LayerScale": "test_vit4",
    "DeiT": "deit_tiny_patch16_224",
    "DeiT-III": "deit3_small_patch16_224",
    "DINOv2": "vit_small_patch14_dinov2",
    "DINOv2 with registers": "vit_small_patch14_reg4_dinov2",
    "CLIP": "vit_base_patch16_clip_224",
    "SigLIP": "vit_base_patch16_siglip_224",
    "EVA-02": "eva02_tiny_patch14_224",
    "DINOv3": "vit_small_patch16_dinov3",
    "mixed rotary frequencies": "vit_small_patch16_rope_mixed_224",
    "axial rotary embedding": "vit_small_patch16_rope_224",
}
SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2}


def small(model_name, **settings):
    torch.manual_seed(0)
    settings = {"img_size": 64, "global_blocks": 1, "model_args": SMALL} | settings
    return TimmViT(model_name=model_name, **settings).eval()


def randomise(model):
    """Weights that no initialisation makes trivial (LayerScale, position embeddings, registers)."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("size", [(64, 64), (48, 96)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_timm_where_all_blocks_are_global(name, size):
    model_name = FAMILIES[name]
    backbone = randomise(small(model_name, window_size=0))
    images = torch.randn(2, 3, *size)
    expected = backbone.vit.forward_intermediates(images, indices=1, intermediates_only=True)[0]
    torch.testing.assert_close(backbone(images)["last_feat"], expected)


def copy_to_detectron2(vit, window_size, window_blocks, img_size):
    """Detectron2's ViT with a timm VisionTransformer's weights; it has no prefix tokens."""
    theirs = ViT(
        img_size=img_size,
        patch_size=16,
        embed_dim=vit.embed_dim,
        depth=len(vit.blocks),
        num_heads=vit.blocks[0].attn.num_heads,
        mlp_ratio=vit.blocks[0].mlp.fc1.out_features / vit.embed_dim,
        norm_layer=type(vit.blocks[0].norm1),
        window_size=window_size,
        window_block_indexes=window_blocks,
        pretrain_img_size=img_size,
        pretrain_use_cls_token=False,
    ).eval()
    # Detectron2 keeps position embeddings of a square; timm's are for this grid.
    positions = vit.pos_embed.unflatten(1, vit.patch_embed.grid_size)
    theirs.pos_embed = None
    theirs.patch_embed.register_forward_hook(lambda module, args, output: output + positions)
    theirs.load_state_dict({k: v for k, v in vit.state_dict().items() if k != "pos_embed"})
    for ours, block in zip(vit.blocks, theirs.blocks, strict=True):
        block.norm1.eps, block.norm2.eps = ours.norm1.eps, ours.norm2.eps
    return theirs


# In the last case, windows of 3 do not divide the grid: both pad each window.
@pytest.mark.parametrize(
    ("size", "window"), [((64, 64), 2), ((64, 128), 4), ((80, 112), 3)], ids=str
)
def test_equals_detectron2_where_both_are_windowed(size, window):
    backbone = randomise(
        small(
            "vit_tiny_patch16_224",
            img_size=size,
            window_size=window,
            global_blocks=[1],
            prefix_tokens="drop",
        )
    )
    theirs = copy_to_detectron2(backbone.vit, window, [0, 2], 64)
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(
        backbone(images)["last_feat"], theirs(images)["last_feat"], rtol=1e-4, atol=1e-4
    )


def test_position_embeddings_of_another_grid_differ_from_detectron2_by_antialiasing_alone():
    backbone = randomise(small("vit_tiny_patch16_224", prefix_tokens="drop"))
    vit = backbone.vit
    torch.testing.assert_close(
        get_abs_pos(vit.pos_embed, False, (4, 4)), vit.pos_embed.view(1, 4, 4, -1)
    )
    resampled = timm.layers.resample_abs_pos_embed(vit.pos_embed, [6, 8], num_prefix_tokens=0)
    x = vit.patch_embed(torch.zeros(1, 3, 96, 128))
    torch.testing.assert_close(vit._pos_embed(x) - x.flatten(1, 2), resampled)


@pytest.mark.parametrize("name", FAMILIES)
def test_order_of_tokens_between_blocks_changes_nothing(name, monkeypatch):
    """Kept window by window or row by row, with prefix tokens and rotary tables alike."""
    model_name = FAMILIES[name]
    backbone = randomise(small(model_name, img_size=(64, 128), window_size=2, global_blocks=[1]))
    images = torch.randn(2, 3, 64, 128)
    by_window = backbone(images)["last_feat"]
    orders = []

    class RowByRow(timm_vit.TokenOrder):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            orders.append(self.by_window)
            self.by_window = False

    monkeypatch.setattr(timm_vit, "TokenOrder", RowByRow)
    torch.testing.assert_close(backbone(images)["last_feat"], by_window, rtol=1e-4, atol=1e-4)
    assert orders == [True]


def test_windowed_block_does_not_look_beyond_its_window():
    backbone = randomise(
        small("vit_tiny_patch16_224", window_size=2, global_blocks=[], prefix_tokens="drop")
    )
    images = torch.randn(1, 3, 64, 64)
    changed = images.clone()
    changed[..., :16, :16] += 1
    difference = (backbone(images)["last_feat"] - backbone(changed)["last_feat"]).abs().amax(1)[0]
    assert (difference[:2, :2] > 1e-3).all()
    assert difference[2:].max() == 0 and difference[:, 2:].max() == 0


def test_rotary_table_of_a_window_is_that_of_an_image_of_its_size():
    backbone = randomise(small("eva02_tiny_patch14_224", img_size=128, window_size=4))
    captured = []
    backbone.vit.blocks[0].attn.register_forward_pre_hook(
        lambda module, args, kwargs: captured.append(kwargs["rope"]), with_kwargs=True
    )
    backbone(torch.randn(1, 3, 128, 128))
    torch.testing.assert_close(captured[0], backbone.vit.rope.get_embed(shape=(4, 4)))


def test_drop_path_drops_whole_images_not_windows():
    backbone = randomise(small("vit_tiny_patch16_224", window_size=2, drop_path_rate=0.5))
    backbone.train()
    block = backbone.vit.blocks[2]
    backbone.vit.blocks = torch.nn.Sequential(block)
    backbone.global_blocks = frozenset()
    seen = []
    block.drop_path1.register_forward_hook(
        lambda module, args, out: seen.append((out == 0).flatten(1).all(1))
    )
    block.drop_path1.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    backbone(torch.randn(8, 3, 64, 64))
    shape, dropped = seen
    assert shape[0] == 8
    assert 0 < dropped.sum() < 8


def test_prefix_tokens_can_be_dropped():
    backbone = small("deit_tiny_patch16_224", prefix_tokens="drop")
    assert "vit.cls_token" not in backbone.state_dict()
    assert backbone.vit.pos_embed.shape[1] == 16
    assert backbone(torch.randn(1, 3, 64, 64))["last_feat"].shape == (1, 32, 4, 4)


def test_every_parameter_gets_a_gradient():
    for name in ("class token", "SigLIP", "EVA-02", "DINOv3", "CLIP"):
        backbone = small(FAMILIES[name], window_size=2).train()
        backbone(torch.randn(2, 3, 64, 64))["last_feat"].square().sum().backward()
        assert [n for n, p in backbone.named_parameters() if p.grad is None] == [], name


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointed in (False, True):
        backbone = randomise(
            small("test_vit2", window_size=2, act_checkpoint=checkpointed, drop_path_rate=0.3)
        ).train()
        torch.manual_seed(3)
        backbone(torch.randn(2, 3, 64, 64))["last_feat"].square().mean().backward()
        gradients.append([p.grad for p in backbone.parameters()])
    torch.testing.assert_close(*gradients)


def test_patch_of_14_becomes_16_with_its_stride():
    backbone = small("vit_small_patch14_dinov2")
    assert backbone.output_shape()["last_feat"].stride == 16
    assert backbone.vit.patch_embed.proj.weight.shape[-1] == 16
    kept = small("vit_small_patch14_dinov2", patch_size=14, img_size=56)
    assert kept.output_shape()["last_feat"].stride == 14
    with pytest.raises(UserError, match="stride of TimmViT is 14"):
        SimplePyramid(net=kept, out_channels=8, scale_factors=(2.0, 1.0))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model_name": "vit_smal_patch16_224"}, "no model 'vit_smal_patch16_224'"),
        ({"model_name": "resnet18", "model_args": {}}, "resnet18"),
        ({"model_name": "swin_tiny_patch4_window7_224", "model_args": {}}, "swin_tiny"),
        ({"window_size": -1}, "window_size is -1"),
        ({"global_blocks": [3]}, r"global_blocks names \[3\], but it has blocks 0 to 2"),
        ({"global_blocks": -1}, "global_blocks is -1; it must be an integer of at least 0"),
        ({"prefix_tokens": "mean"}, "prefix_tokens is 'mean'"),
        ({"model_args": SMALL | {"patch_drop_rate": 0.5}}, "patch dropout leaves no grid"),
        ({"model_args": {"deepth": 3}}, "deepth"),
        ({"pretrained": "absent.pth"}, "no such file: absent.pth"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_settings_are_refused_in_one_line(settings, named):
    with pytest.raises(UserError, match=named) as error:
        small(**{"model_name": "vit_tiny_patch16_224"} | settings)
    assert "\n" not in str(error.value)


def test_a_last_norm_that_is_not_there_is_refused():
    """EVA-02 has one after its tokens are averaged: features would come out without any."""
    with pytest.raises(UserError, match="final_norm is True, but it has no norm over its tokens"):
        small("eva02_tiny_patch14_224", img_size=56, window_size=2, final_norm=True)


def test_blocks_that_compute_otherwise_are_refused_in_windows():
    name = "vit_medium_patch16_gap_240"
    arguments = SMALL | {"block_fn": timm.models.vision_transformer.ParallelScalingBlock}
    images = torch.randn(1, 3, 64, 64)
    # Fused attention is switched in each of them, whatever they call theirs.
    for block in ("ParallelScalingBlock", "ParallelThingsBlock"):
        kind = {"block_fn": getattr(timm.models.vision_transformer, block)}
        network = small(name, window_size=0, model_args=SMALL | kind)
        with torch.autocast("cpu", torch.bfloat16):
            low = network(images)["last_feat"]
        switches = [m.fused_attn for m in network.vit.modules() if hasattr(m, "fused_attn")]
        assert switches and not any(switches)
        torch.testing.assert_close(low.float(), network(images)["last_feat"], rtol=0, atol=0.2)
        assert all(m.fused_attn for m in network.vit.modules() if hasattr(m, "fused_attn"))
    with pytest.raises(UserError, match="ParallelScalingBlocks.* set window_size=0"):
        small(name, window_size=2, model_args=arguments)


def test_image_that_the_patches_do_not_divide_is_refused():
    with pytest.raises(UserError, match="72 x 64 pixels is not a multiple of the patch size 16"):
        small("vit_tiny_patch16_224")(torch.randn(1, 3, 72, 64))


class TestWeights:
    """From a local file: the whole trunk or an error, sizes resampled, nothing executed."""

    def source(self, **arguments):
        torch.manual_seed(5)
        return timm.create_model("vit_tiny_patch16_224", **SMALL | arguments)

    def test_timm_file(self, tmp_path):
        torch.save(self.source(img_size=64).state_dict(), tmp_path / "timm.pth")
        backbone = small("vit_tiny_patch16_224", pretrained=str(tmp_path / "timm.pth"))
        for key, value in self.source(img_size=64).state_dict().items():
            if not key.startswith(("norm", "head", "fc_norm")):
                torch.testing.assert_close(backbone.vit.state_dict()[key], value)

    def test_other_grid_and_patch_are_resampled_as_timm_does(self, tmp_path):
        source = self.source(img_size=112, patch_size=14)
        torch.save({"model": source.state_dict()}, tmp_path / "mae.pth")
        path = str(tmp_path / "mae.pth")
        ours = small("vit_tiny_patch16_224", img_size=(96, 64), pretrained=path).vit.state_dict()
        theirs = timm.create_model(
            "vit_tiny_patch16_224",
            pretrained=True,
            pretrained_cfg_overlay={"file": path, "hf_hub_id": None},
            img_size=(96, 64),
            num_classes=0,
            **SMALL,
        ).state_dict()
        for key in ("pos_embed", "patch_embed.proj.weight", "blocks.1.attn.qkv.weight"):
            torch.testing.assert_close(ours[key], theirs[key])

    def test_missing_weight_is_named(self, tmp_path):
        state = self.source(img_size=64).state_dict()
        del state["blocks.1.norm1.weight"]
        torch.save(state, tmp_path / "part.pth")
        with pytest.raises(UserError, match="blocks.1.norm1.weight is missing"):
            small("vit_tiny_patch16_224", pretrained=str(tmp_path / "part.pth"))

    def test_last_norm_may_be_missing_only_where_it_is_not_used(self, tmp_path):
        state = self.source(img_size=64).state_dict()
        path = str(tmp_path / "part.pth")
        torch.save({k: v for k, v in state.items() if not k.startswith("norm.")}, path)
        small("vit_tiny_patch16_224", pretrained=path)
        with pytest.raises(UserError, match="norm.weight is missing"):
            small("vit_tiny_patch16_224", pretrained=path, final_norm=True)

    def test_weights_of_another_model_are_refused(self, tmp_path):
        torch.save(self.source(img_size=64, depth=4).state_dict(), tmp_path / "deep.pth")
        with pytest.raises(UserError, match="blocks.3.* is unexpected"):
            small("vit_tiny_patch16_224", pretrained=str(tmp_path / "deep.pth"))

    def test_dinov2_file_of_facebook(self, tmp_path):
        model = timm.create_model("vit_small_patch14_dinov2", img_size=56, num_classes=0, **SMALL)
        state = model.state_dict() | {"mask_token": torch.zeros(1, 32)}
        torch.save(state, tmp_path / "dinov2.pth")
        backbone = small("vit_small_patch14_dinov2", pretrained=str(tmp_path / "dinov2.pth"))
        key = "blocks.2.ls1.gamma"
        torch.testing.assert_close(backbone.vit.state_dict()[key], model.state_dict()[key])

    def test_pretrained_weights_that_cannot_be_fetched_are_one_line(self, monkeypatch):
        def fetch(*args, **kwargs):
            raise OSError("no route to host\nmore of it")

        monkeypatch.setattr("timm.models._builder.load_pretrained", fetch)
        with pytest.raises(UserError, match="no route.*: pretrained=PATH") as error:
            small("vit_tiny_patch16_224", pretrained=True, model_args={})
        assert "\n" not in str(error.value)


def test_prefix_dropped_after_loading_keeps_the_positions_of_patches(tmp_path):
    torch.manual_seed(5)
    source = timm.create_model("vit_tiny_patch16_224", img_size=64, **SMALL)
    torch.save(source.state_dict(), tmp_path / "timm.pth")
    path = str(tmp_path / "timm.pth")
    dropped = small("vit_tiny_patch16_224", pretrained=path, prefix_tokens="drop")
    torch.testing.assert_close(dropped.vit.pos_embed, source.pos_embed[:, 1:])
    assert isinstance(dropped.vit, VisionTransformer)

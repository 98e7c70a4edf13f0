"""The ViTDet recipes: the zoo's teacher by key, one size, groups by name, a step at 128 pixels."""

import copy
import pickle

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from PIL import Image
from test_configs import CONFIGS, load, names, plain, write_zoo_file
from toys import make_batch

from dfd import FrozenTeacher, UserError
from dfd.engine.build import build_optimizer
from dfd.engine.config.resolve import resolve_config
from dfd.engine.optim import parameter_groups

pytestmark = pytest.mark.slow

RECIPES = [n for n in names(CONFIGS.glob("vitdet/*.py")) if "base" not in n]
DISTILLED = [n for n in RECIPES if "student" not in n]


def offline(name, *overrides):
    """A recipe without what is fetched."""
    prefix = "model" if "student" in name else "model.student"
    more = [f"{prefix}.backbone.net.pretrained=False", "train.device=cpu"]
    if "student" not in name:
        more += ["model.teacher.checkpoint=", "model.teacher.allow_random=True"]
    MetadataCatalog.get("coco_2017_train")  # Registered by Detectron2, with its 80 classes.
    return resolve_config(load(name, *more, *overrides))


def state_shapes(config):
    return {key: tuple(value.shape) for key, value in instantiate(config).state_dict().items()}


def zoo_vitdet():
    return model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model


def test_teacher_has_the_zoos_keys_and_shapes_at_every_size():
    cfg = offline("vitdet/dfd_b_s_512.py")
    shapes = state_shapes(cfg.model.teacher.model)
    # The checkpoint's relative positions, whatever the size of the images.
    assert shapes["backbone.net.blocks.2.attn.rel_pos_h"] == (127, 64)
    assert shapes == state_shapes(zoo_vitdet())
    expected = plain(cfg)["model"]["teacher"]["model"]
    for name in ("vitdet/dfd_b_t_100ep.py", "vitdet/dfd_b1024_s_512.py"):
        teacher = plain(offline(name))["model"]["teacher"]["model"]
        teacher["backbone"]["square_pad"] = 512
        assert teacher == expected


@pytest.fixture(scope="module")
def small_zoo(tmp_path_factory):
    """The zoo's ViTDet made small, a stand-in for its file, and the recipe's teacher as small."""
    path = tmp_path_factory.mktemp("zoo") / "model_final.pkl"
    config = zoo_vitdet()
    teacher = offline("vitdet/dfd_b_s_100ep.py", "vit.img_size=128").model.teacher.model
    for model in (config, teacher):
        net = model.backbone.net
        net.update(embed_dim=32, depth=4, num_heads=2, window_block_indexes=[0, 2])
        model.backbone.square_pad = 128
    torch.manual_seed(0)
    theirs = instantiate(config).eval()
    write_zoo_file(theirs, path)
    return path, theirs, teacher


def test_teacher_computes_what_the_zoos_model_computes(small_zoo):
    path, theirs, config = small_zoo
    teacher = FrozenTeacher(model=instantiate(config), checkpoint=str(path), precision="fp32")
    batch = make_batch([(96, 128)])
    with torch.no_grad():
        expected = theirs.backbone(theirs.preprocess_image(batch).tensor)
    for name, features in teacher(batch, input_format="RGB").items():
        torch.testing.assert_close(features, expected[name])
    (found,) = teacher.detect(batch, input_format="RGB")
    assert found["instances"].image_size == (96, 128)


def test_zoo_file_with_a_key_taken_out_is_refused(small_zoo, tmp_path):
    path, _, config = small_zoo
    with open(path, "rb") as f:
        content = pickle.load(f)
    del content["model"]["backbone.net.blocks.3.attn.rel_pos_w"]
    damaged = tmp_path / "damaged.pkl"
    damaged.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="blocks.3.attn.rel_pos_w is missing"):
        FrozenTeacher(model=instantiate(config), checkpoint=str(damaged))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vitdet/student_s_100ep.py", {640: 10, 1024: 16}),
        ("vitdet/dfd_b_t_100ep.py", {640: 10}),
        ("vitdet/pkd_b_s_512.py", {768: 16}),
        ("vitdet/dfd_b_cascade_s_100ep.py", {512: 16}),
    ],
)
def test_one_size_sets_crop_padding_embeddings_and_windows(name, sizes):
    for size, window in sizes.items():
        cfg = offline(name, f"vit.img_size={size}")
        train, test = (plain(cfg)["dataloader"][split]["mapper"] for split in ("train", "test"))
        _, resize, crop = train["augmentations"]
        assert (resize["target_height"], resize["target_width"]) == (size, size)
        assert crop["crop_size"] == [size, size]
        (resize,) = test["augmentations"]
        assert (resize["short_edge_length"], resize["max_size"]) == (size, size)
        student = cfg.model.get("student", cfg.model)
        assert student.backbone.square_pad == size
        if "teacher" in cfg.model:
            assert cfg.model.teacher.model.backbone.square_pad == size
        with torch.device("meta"):
            net = instantiate(student.backbone.net)
        assert net.vit.pos_embed.shape[1] == (size // 16) ** 2 + 1
        assert net.window_size == window
        instantiate(cfg.dataloader.train.mapper)


def test_high_resolution_teacher_has_sizes_of_its_own():
    cfg = offline("vitdet/dfd_b1024_s_512.py")
    for split in ("train", "test"):
        mapper = instantiate(cfg.dataloader[split].mapper)
        assert mapper.augmentations.resize.scale == 0.5
        for augmentation in mapper.augmentations.augmentations.augs:
            for key in ("target_height", "target_width", "crop_size", "max_size"):
                size = getattr(augmentation, key, 1024)
                assert set(np.atleast_1d(size)) == {1024}, key
    assert cfg.model.student.backbone.square_pad == 512
    assert cfg.model.teacher.model.backbone.square_pad == 1024
    assert instantiate(cfg.model.teacher.scale) == 2
    cfg = offline("vitdet/dfd_b1024_s_512.py", "vit.img_size=640", "model.head.align=resize")
    assert instantiate(cfg.model.teacher.scale) == 1.6


@pytest.mark.parametrize("name", ["student_s_100ep.py", "dfd_b1024_s_512.py"])
def test_images_are_cropped_with_their_masks_to_the_size(name, tmp_path):
    cfg = offline(f"vitdet/{name}", "vit.img_size=64")
    if "1024" in name:
        cfg.vit.teacher_size = 128
    path = tmp_path / "image.png"
    Image.fromarray(np.zeros((90, 120, 3), dtype=np.uint8)).save(path)
    polygon = [[20.0, 20, 100, 20, 100, 80, 20, 80]]
    annotation = {"bbox": [20, 20, 100, 80], "bbox_mode": 0, "category_id": 3, "iscrowd": 0}
    annotation["segmentation"] = polygon
    record = {"file_name": str(path), "height": 90, "width": 120, "annotations": [annotation]}
    mapper = instantiate(cfg.dataloader.train.mapper)
    np.random.seed(0)
    items = [mapper(copy.deepcopy(record)) for _ in range(12)]
    largest = max(max(item["image"].shape) for item in items)
    assert largest == 64
    if "1024" in name:
        assert max(max(item["teacher_image"].shape) for item in items) == 128
    found = [item["instances"] for item in items if len(item["instances"])]
    assert found
    for instances in found:
        boxes = instances.gt_masks.get_bounding_boxes().tensor
        torch.testing.assert_close(instances.gt_boxes.tensor, boxes)  # They fit the cropped masks.


@pytest.mark.parametrize("name", ["vitdet/student_t_100ep.py", "vitdet/dfd_b1024_s_512.py"])
def test_pixels_and_loaders_follow_the_timm_model(name):
    def pixels(cfg):
        student = cfg.model.get("student", cfg.model)
        assert student.input_format == "RGB"
        for split in ("train", "test"):
            assert plain(cfg)["dataloader"][split]["mapper"]["image_format"] == "RGB"
        return plain(student)["pixel_mean"]

    assert pixels(offline(name)) == [127.5] * 3
    prefix = "model" if "student" in name else "model.student"
    cfg = offline(name, f"{prefix}.backbone.net.model_name=deit3_small_patch16_224.fb_in1k")
    assert pixels(cfg) == pytest.approx([123.675, 116.28, 103.53])


def test_model_without_position_embeddings_is_one_override():
    cfg = offline(
        "vitdet/student_t_100ep.py",
        "model.backbone.net.model_name=vit_small_patch16_dinov3.lvd1689m",
        "vit.img_size=128",
        "+model.backbone.net.model_args={depth: 2}",
    )
    model = instantiate(cfg.model)
    assert model.backbone.net.vit.pos_embed is None
    build_optimizer(cfg, model)


def test_pixels_that_no_timm_model_tells_are_refused():
    with pytest.raises(UserError, match="is auto, but its backbone has no timm model"):
        resolve_config(
            load("mask_rcnn/student_r50_2x.py", "model.pixel_mean=auto", "train.device=cpu")
        )


@pytest.mark.parametrize("name", [n for n in RECIPES if "/pkd" in n])
def test_baseline_differs_from_dfd_by_the_criterion_alone(name):
    baseline, dfd = plain(load(name)), plain(load(name.replace("/pkd", "/dfd")))
    assert baseline["model"]["head"].pop("criterion") == baseline["criteria"]["pkd"]
    del dfd["model"]["head"]["criterion"]
    assert baseline["train"].pop("output_dir") != dfd["train"].pop("output_dir")
    assert baseline == dfd


def test_recipe_is_the_stock_one():
    """100 epochs = 184375 iterations of 64 images; steps at 163889 and 177546, warm-up of 250."""
    cfg = load("vitdet/student_s_100ep.py")
    assert (cfg.train.max_iter, cfg.dataloader.train.total_batch_size) == (184375, 64)
    rates = instantiate(cfg.lr_multiplier)
    at = {i: rates(i / 184375) for i in (0, 250, 163888, 163890, 177545, 177547)}
    assert list(at.values()) == pytest.approx([0.001, 1, 1, 0.1, 0.1, 0.01])
    theirs = zoo_vitdet()
    ours = cfg.model
    for key in ("proposal_generator", "roi_heads"):
        assert plain(ours)[key] == plain(OmegaConf.create(theirs))[key]


GROUPS = {
    # name: (power of the layer decay 0.7, weight decay)
    "backbone.net.vit.pos_embed": (13, 0.0),
    "backbone.net.vit.cls_token": (13, 0.1),
    "backbone.net.vit.patch_embed.proj.weight": (13, 0.1),
    "backbone.net.vit.patch_embed.proj.bias": (13, 0.0),
    "backbone.net.vit.blocks.0.norm1.weight": (12, 0.0),
    "backbone.net.vit.blocks.0.attn.qkv.weight": (12, 0.1),
    "backbone.net.vit.blocks.11.attn.qkv.bias": (1, 0.0),
    "backbone.net.vit.blocks.11.mlp.fc2.weight": (1, 0.1),
    "backbone.simfp_2.0.weight": (0, 0.1),
    "backbone.simfp_2.1.weight": (0, 0.0),
    "roi_heads.mask_head.predictor.weight": (0, 0.1),
}


def test_layer_scale_and_register_tokens_by_name():
    cfg = offline(
        "vitdet/student_t_100ep.py",
        "model.backbone.net.model_name=vit_small_patch14_reg4_dinov2",
        "+model.backbone.net.model_args={embed_dim: 32, num_heads: 2}",
        "vit.img_size=128",
    )
    with torch.device("meta"):
        model = instantiate(cfg.model)
    params = {k: v for k, v in cfg.optimizer.params.items() if k != "_target_"}
    params.update(base_lr=1.0, weight_decay=0.1)
    groups = parameter_groups(model=model, **OmegaConf.to_container(OmegaConf.create(params)))
    found = {n: (g["lr"], g["weight_decay"]) for g in groups for n in g["param_names"]}
    for key, depth, decay in (
        ("reg_token", 13, 0.1),
        ("cls_token", 13, 0.1),
        ("pos_embed", 13, 0.0),
        ("blocks.4.ls1.gamma", 8, 0.0),
        ("blocks.4.attn.proj.weight", 8, 0.1),
    ):
        rate, weight_decay = found[f"backbone.net.vit.{key}"]
        assert rate == pytest.approx(0.7**depth), key
        assert weight_decay == decay, key


@pytest.mark.parametrize("name", ["dfd_b_t_100ep.py", "dfd_b_cascade_s_100ep.py"])
def test_recipe_trains_a_step_and_evaluates_at_128_pixels(name):
    """In full width and depth: ViTDet-B teaches T, and with cascaded heads S."""
    # Otherwise all blocks would be global at this size.
    net = "model.student.backbone.net"
    windows = [f"{net}.window_size=4", f"{net}.act_checkpoint=True"]
    cfg = offline(f"vitdet/{name}", "vit.img_size=128", *windows)
    # Less to look at, or most of the time goes into the heads.
    cfg.model.student.roi_heads.batch_size_per_image = 4
    cfg.model.student.proposal_generator.post_nms_topk = [4, 4]
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    optimizer = build_optimizer(cfg, model)
    found = {
        n: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for n in g["param_names"]
    }
    for key, (power, decay) in GROUPS.items():
        assert found[key] == pytest.approx((1e-4 * 0.7**power, decay)), key
    batch = make_batch([(96, 128)], masks=True)
    model.train()
    with EventStorage(0), torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(batch)
    assert {"loss_mask", "loss_dfd_p2", "loss_dfd_p6"} <= set(losses)
    before = model.student.backbone.net.vit.blocks[0].attn.qkv.weight.clone()
    sum(losses.values()).backward()
    optimizer.step()
    assert not torch.equal(before, model.student.backbone.net.vit.blocks[0].attn.qkv.weight)
    with torch.no_grad():
        (output,) = model.eval()(batch)
    assert output["instances"].image_size == (96, 128)

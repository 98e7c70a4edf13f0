"""Every config loads, and the models of the COCO recipes are the model zoo's.

The zoo's weights are not at hand. What stands in for them is the zoo's own architecture, built from
the zoo's own config and saved in the form of the zoo's files.
"""

import copy
import functools
import pickle
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig, OmegaConf
from toys import make_batch

from dfd import DistilledDetector, FrozenTeacher, UserError
from dfd.distill.contract import num_classes
from dfd.engine.config.flat import differing, flat_settings
from dfd.engine.config.load import ConfigFile
from dfd.engine.config.resolve import resolve_config, skip_pretrained

CONFIGS = Path(__file__).parents[2] / "configs"


def names(paths):
    return [str(path.relative_to(CONFIGS)) for path in sorted(paths)]


SHARED = names([*CONFIGS.glob("common/**/*.py"), *CONFIGS.glob("*/base*.py")])
RECIPES = names(set(CONFIGS.glob("*/*.py")) - {CONFIGS / name for name in SHARED})
DISTILLED = [name for name in RECIPES if Path(name).name.startswith("dfd")]
SMALL = [name for name in RECIPES if name.startswith(("bccd/", "demo/", "photos/", "study_"))]


config_file = functools.cache(lambda name: ConfigFile(str(CONFIGS / name)))


def load(name, *overrides):
    return config_file(name).load(overrides)


def plain(cfg):
    return OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize("name", SHARED)
def test_shared_config_loads(name):
    assert isinstance(LazyConfig.load(str(CONFIGS / name)), DictConfig)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_loads_and_its_saved_form_is_the_same(name, tmp_path):
    cfg = load(name)
    for key in ("train", "test", "evaluator"):
        assert key in cfg.dataloader
    assert cfg.train.output_dir == "output/" + name.removesuffix(".py")
    saved = tmp_path / "config.yaml"
    LazyConfig.save(cfg, str(saved))
    assert list(tmp_path.iterdir()) == [saved]  # A lambda would have made it a pickle.
    before, after = (
        flat_settings(OmegaConf.to_container(c), of_functions=False)
        for c in (cfg, LazyConfig.load(str(saved)))
    )
    assert differing(before, after) == [] and before.texts.keys() == after.texts.keys()


@pytest.mark.parametrize(
    "override",
    [
        "train.max_iters=7",
        "model.student.backbone.out_chanels=8",
        "model.head.criterion.wieght=2",
        "model.teacher.chekpoint=x.pth",
    ],
)
def test_misspelt_override_is_refused(override):
    with pytest.raises(UserError, match=f"override {override.split('=')[0]}: .* has no"):
        load("faster_rcnn/dfd_x101_r50_2x.py", override)


def plain_sibling(name):
    """The student in its folder with the longest matching ending (dfd_x_y: student_y)."""
    path = CONFIGS / name
    endings = {student.stem.removeprefix("student") for student in path.parent.glob("student*.py")}
    ending = max((e for e in endings if path.stem.endswith(e)), key=len)
    return f"{path.parent.name}/student{ending}.py"


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTILLED)
def test_distilled_run_differs_from_the_plain_one_by_the_distillation_alone(name):
    distilled, student = plain(load(name)), plain(load(plain_sibling(name)))
    if "unlabelled" in name:
        for cfg in (distilled, student):
            for key in ("unlabelled", "unlabelled_batch_size"):
                del cfg["dataloader"]["train"][key]
            del cfg["dataloader"]["train"]["dataset"]["num_images"]
    if "1024" in name:  # The image in two sizes.
        for cfg in (distilled, student):
            for split in ("train", "test"):
                del cfg["dataloader"][split]["mapper"]
            del cfg["vit"]
    assert distilled["model"].pop("_target_") in (DistilledDetector, "dfd.DistilledDetector")
    assert distilled["model"].pop("student") == student.pop("model")
    assert {"teacher", "head"} <= set(distilled.pop("model")) <= {"teacher", "head", "inherit"}
    distilled.pop("teachers", None)  # To choose from.
    assert set(distilled.pop("criteria")) >= {"dfd", "mimic", "cwd", "pkd", "mgd", "fgd"}
    assert distilled["train"].pop("output_dir") != student["train"].pop("output_dir")
    assert distilled == student


# Some of them: the choice of criteria is shared.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "bccd/dfd.py",
        "mask_rcnn/dfd_r101_r50_2x.py",
        "retinanet/dfd_r101_r50_2x.py",
        "vitdet/dfd_b_s_100ep.py",
    ],
)
def test_run_with_another_criterion_differs_by_the_criterion_alone(name):
    default = plain(load(name))
    for key, wanted in default["criteria"].items():
        cfg = load(name, f"model.head.criterion=${{criteria.{key}}}")
        assert isinstance(instantiate(cfg.model.head.criterion), wanted["_target_"])
        other = plain(cfg)
        assert other["model"]["head"].pop("criterion") == wanted
        expected = copy.deepcopy(default)
        del expected["model"]["head"]["criterion"]
        assert other == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_small_model_takes_its_classes_from_the_data(name):
    MetadataCatalog.get("three_classes").thing_classes = ["a", "b", "c"]
    cfg = load(name, "dataloader.train.dataset=three_classes", "train.device=cpu")
    if "teacher" in cfg.model:
        detects = "model" in cfg.model.teacher
        cfg.model.teacher.update({"checkpoint": ""} if detects else {}, allow_random=True)
    skip_pretrained(cfg.model)  # Which would be downloaded.
    model = instantiate(resolve_config(cfg).model)
    if isinstance(model, DistilledDetector) and detects:
        assert num_classes(model.teacher.model) == 3 or not model.teacher.check_classes
        shapes = model.student.backbone.output_shape(), model.teacher.model.backbone.output_shape()
        strides = {shape.stride for shape in shapes[1].values()}
        shared = sorted(level for level, shape in shapes[0].items() if shape.stride in strides)
        assert [pair.name for pair in model.head.pairs] == shared and len(shared) >= 3
        report = model.inherit_from_teacher()
        assert report is None or not report.skipped
    assert num_classes(getattr(model, "student", model)) == 3


@pytest.mark.parametrize("max_iter", [180000, 1800])
def test_coco_schedule_is_detectron2s_2x_at_any_length(max_iter):
    scheduler = instantiate(load("faster_rcnn/student_r50_2x.py").lr_multiplier)
    theirs = instantiate(model_zoo.get_config("common/coco_schedule.py").lr_multiplier_2x)
    steps = range(0, max_iter, max_iter // 900)
    ours = [scheduler(step / max_iter) for step in steps]
    assert ours == pytest.approx([theirs(step / max_iter) for step in steps])
    drops = [step for step, a, b in zip(steps, ours[1:], ours, strict=False) if a < b]
    assert drops == pytest.approx([max_iter * 2 / 3, max_iter * 8 / 9], abs=max_iter / 800)


# A recipe, the zoo's configs of its teacher and of its student, and the levels that they share.
Zoo = namedtuple("Zoo", "recipe teacher student levels")

COCO = [
    Zoo(
        "faster_rcnn/dfd_x101_r50_2x.py",
        "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml",
        "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
        ["p2", "p3", "p4", "p5", "p6"],
    ),
    Zoo(
        "retinanet/dfd_r101_r50_2x.py",
        "COCO-Detection/retinanet_R_101_FPN_3x.yaml",
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        ["p3", "p4", "p5", "p6", "p7"],
    ),
    Zoo(
        "mask_rcnn/dfd_r101_r50_2x.py",
        "new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        ["p2", "p3", "p4", "p5", "p6"],
    ),
]
COCO_IDS = [zoo.recipe for zoo in COCO]


@pytest.mark.parametrize("zoo", COCO, ids=COCO_IDS)
def test_coco_recipe_has_the_zoos_weights_data_and_learning_rate(zoo):
    cfg, theirs = load(zoo.recipe), model_zoo.get_config(zoo.student)
    url = model_zoo.get_checkpoint_url(zoo.teacher)
    prefix = "https://dl.fbaipublicfiles.com/detectron2/"
    assert cfg.model.teacher.checkpoint == url.replace(prefix, "detectron2://")
    assert cfg.train.init_checkpoint == theirs.MODEL.WEIGHTS
    assert cfg.train.max_iter == 2 * theirs.SOLVER.MAX_ITER
    assert cfg.optimizer.lr == theirs.SOLVER.BASE_LR
    data = cfg.dataloader
    assert data.train.total_batch_size == theirs.SOLVER.IMS_PER_BATCH
    assert (data.train.dataset,) == theirs.DATASETS.TRAIN
    assert (data.test.dataset,) == (plain(cfg)["dataloader"]["evaluator"]["dataset"],)
    assert (data.test.dataset,) == theirs.DATASETS.TEST
    assert data.train.mapper.use_instance_mask == theirs.MODEL.MASK_ON
    resize = data.train.mapper.augmentations[0]
    assert tuple(resize.short_edge_length) == theirs.INPUT.MIN_SIZE_TRAIN
    assert resize.max_size == theirs.INPUT.MAX_SIZE_TRAIN


def build_from_zoo(config):
    """The zoo's architecture from the zoo's config on the CPU, with statistics in its norms."""
    cfg = model_zoo.get_config(config)
    if config.endswith(".py"):
        model = instantiate(cfg.model)
    else:
        cfg.MODEL.DEVICE = "cpu"
        model = build_model(cfg)
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_mean.uniform_(-0.1, 0.1)
            # Above 1, or features grow from block to block until they overflow.
            module.running_var.uniform_(1, 4)
    return model.eval()


def write_zoo_file(model, path, without=None):
    """As the zoo's files: numpy arrays, pixel statistics, no batch-norm counters."""
    arrays = {
        key: value.numpy()
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked") and key != without
    }
    arrays["pixel_mean"] = model.pixel_mean.numpy()
    arrays["pixel_std"] = model.pixel_std.numpy()
    with open(path, "wb") as f:
        pickle.dump({"model": arrays, "__author__": "Detectron2 Model Zoo"}, f)


@pytest.fixture(scope="module", params=COCO, ids=COCO_IDS)
def coco(request, tmp_path_factory):
    """A recipe's model under a stand-in for its teacher's checkpoint, and the zoo's teacher."""
    path = tmp_path_factory.mktemp("zoo") / "model_final.pkl"
    torch.manual_seed(0)
    zoo_teacher = build_from_zoo(request.param.teacher)
    write_zoo_file(zoo_teacher, path)
    cfg = load(request.param.recipe)
    cfg.model.teacher.update(checkpoint=str(path), precision="fp32")
    try:
        model = instantiate(cfg.model)
    finally:
        path.unlink()
    return request.param, model, zoo_teacher


@pytest.mark.slow
def test_coco_recipe_pairs_every_level(coco):
    zoo, model, _ = coco
    for pair, level in zip(model.head.pairs, zoo.levels, strict=True):
        assert (pair.name, pair.teacher_name) == (level, level)
        assert (pair.student_channels, pair.teacher_channels) == (256, 256)


def test_coco_teacher_computes_what_the_zoos_model_computes(coco):
    """Strict loading has compared keys and shapes; strides, for one, are in neither."""
    _, model, zoo_teacher = coco
    batch = make_batch()
    with torch.no_grad():
        expected = zoo_teacher.backbone(zoo_teacher.preprocess_image(batch).tensor)
    order = zoo_teacher.input_format
    with torch.no_grad():
        items = model.teacher.own_images(batch, order)
        own = model.teacher.model.backbone(model.teacher.network_input(items))
    pyramid = model.teacher(batch, input_format=order)
    assert set(pyramid) == set(own) == set(expected)
    for name, features in expected.items():
        assert features.std() > 0
        torch.testing.assert_close(own[name], features)
        # The pass has its norms folded, which rounds otherwise.
        assert (pyramid[name] - features).abs().max() < 1e-4 * features.abs().max()


def test_coco_teacher_detects_on_the_cpu(coco):
    _, model, _ = coco
    with torch.no_grad():
        (output,) = model.teacher.model(make_batch(((64, 96),)))
    assert output["instances"].image_size == (64, 96)


def test_coco_teacher_with_a_key_taken_out_is_refused(coco, tmp_path):
    _, model, zoo_teacher = coco
    path, key = tmp_path / "damaged.pkl", "backbone.bottom_up.res4.22.conv3.weight"
    write_zoo_file(zoo_teacher, path, without=key)
    with pytest.raises(UserError, match=f"{key} is missing"):
        FrozenTeacher(model=model.teacher.model, checkpoint=str(path))
    path.unlink()


@pytest.mark.slow
def test_coco_student_is_the_zoos_down_to_its_losses(coco):
    zoo, model, _ = coco
    student, theirs = model.student, build_from_zoo(zoo.student)
    student.load_state_dict(theirs.state_dict())
    trainable = [name for name, p in student.named_parameters() if p.requires_grad]
    assert trainable == [name for name, p in theirs.named_parameters() if p.requires_grad]
    batch, losses = make_batch(((64, 96),), masks="mask" in zoo.recipe), []
    for detector in (student, theirs):
        torch.manual_seed(0)  # Proposals are sampled.
        with EventStorage(), torch.no_grad():
            losses.append(detector.train()(batch))
    torch.testing.assert_close(losses[0], losses[1])


def test_coco_student_inherits_whole_layers(coco):
    _, model, _ = coco
    report = model.inherit_from_teacher()
    assert report is None or not report.skipped

import os

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from omegaconf import OmegaConf

from dfd import UserError
from dfd.engine.build import build_model, student_of
from dfd.engine.config.load import ConfigFile, load_config
from dfd.engine.config.resolve import pin_defaults, resolve_config, resolve_pixels, set_length
from dfd.losses import DFDLoss, MimicLoss

CONFIG = "configs/bccd/dfd.py"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.max_iter=7", lambda c: c.train.max_iter == 7),
        (
            "model.head.criterion.lenient_on=low",
            lambda c: c.model.head.criterion.lenient_on == "low",
        ),
        # Not in the config, but a parameter of its function.
        ("model.head.weight=2.5", lambda c: c.model.head.weight == 2.5),
        ("model.head.levels=[p3,p4]", lambda c: list(c.model.head.levels) == ["p3", "p4"]),
        ("+train.note=x", lambda c: c.train.note == "x"),
        (
            "dataloader.train.mapper.augmentations.0.short_edge_length=64",
            lambda c: c.dataloader.train.mapper.augmentations[0].short_edge_length == 64,
        ),
    ],
)
def test_override(override, value):
    assert value(load_config(CONFIG, [override]))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.max_iters=7", "train has no 'max_iters'"),
        ("trian.max_iter=7", "the config has no 'trian'"),
        ("model.head.criterion.lenient_off=high", "model.head.criterion has no 'lenient_off'"),
        ("model.haed.weight=1", "model has no 'haed'"),
        ("train.max_iter.x=1", "train.max_iter has no 'x'"),
        ("nonsense", "cannot be read"),
        ("train.max_iter=[", "its value cannot be read"),
        ("a=[", "the config has no 'a'"),
        ("--resume", "--resume stands among the overrides"),
    ],
)
def test_misspelt_override_would_change_nothing(override, named):
    with pytest.raises(UserError) as error:
        load_config(CONFIG, [override])
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_misspelt_override_of_a_saved_config_is_refused_too(tmp_path):
    path = str(tmp_path / "config.yaml")
    LazyConfig.save(load_config(CONFIG), path)
    assert load_config(path, ["model.head.weight=2"]).model.head.weight == 2
    with pytest.raises(UserError, match="model.head.criterion has no 'lenient_off'"):
        load_config(path, ["model.head.criterion.lenient_off=high"])


def with_criteria(tmp_path):
    """CONFIG with a choice of criteria beside it."""
    cfg = load_config(CONFIG)
    cfg.criteria = {"mimic": L(MimicLoss)(weight=1.0)}
    path = tmp_path / "config.yaml"
    LazyConfig.save(cfg, str(path))
    return str(path)


def test_criterion_is_chosen_by_an_override(tmp_path):
    cfg = load_config(
        with_criteria(tmp_path),
        ["model.head.criterion=${criteria.mimic}", "criteria.mimic.weight=3"],
    )
    criterion = instantiate(cfg.model.head.criterion)
    assert isinstance(criterion, MimicLoss)
    assert criterion.weight == 3


def test_override_below_a_reference_would_replace_what_it_refers_to(tmp_path):
    overrides = ["model.head.criterion=${criteria.mimic}", "model.head.criterion.weight=3"]
    with pytest.raises(UserError) as error:
        load_config(with_criteria(tmp_path), overrides)
    assert "override criteria.mimic.weight instead" in str(error.value)


def test_saved_config_does_not_change_with_the_defaults(tmp_path):
    cfg = load_config(CONFIG, ["model.head.criterion.weight=3"])
    assert "scale" not in cfg.model.head.criterion
    path = str(tmp_path / "config.yaml")
    LazyConfig.save(pin_defaults(cfg), path)
    saved = load_config(path).model.head
    assert saved.criterion.weight == 3
    assert saved.criterion.scale == DFDLoss().scale
    assert saved.level_weights == "cells"  # DFDHead's.
    # What is not ours is left as it was.
    assert saved.keys() > {"warmup_iters"} and "norm" not in cfg.model.student.backbone
    instantiate(saved)


def test_a_config_that_is_run_once_gives_each_cell_its_own(tmp_path):
    """A cell of an ablation must not begin from what the one before it has changed."""
    file = tmp_path / "config.py"
    file.write_text(
        "from dfd.engine import load_config\n"
        f"base = load_config({CONFIG!r})\n"
        "model, dataloader, optimizer = base.model, base.dataloader, base.optimizer\n"
        "lr_multiplier, train = base.lr_multiplier, base.train\n"
        f"open({str(tmp_path / 'runs')!r}, 'a').write('run ')\n"
    )
    config = ConfigFile(str(file))
    before = config.load()
    changed = config.load(["train.max_iter=7", "model.head.levels=[p3]"])
    changed.model.student.backbone.out_channels = 3
    assert config.load() == before != changed
    assert (tmp_path / "runs").read_text() == "run "


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no such file"),
        ("model = dict()", "defines no dataloader, optimizer, lr_multiplier, train"),
        ("model = dict(", "cannot be loaded"),
        ("from .absent import model", "cannot be loaded"),
    ],
)
def test_unusable_config_file_is_named(tmp_path, content, named):
    path = tmp_path / "config.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        load_config(str(path))
    assert named in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_config_file_at_all():
    with pytest.raises(UserError, match="--config-file"):
        load_config("")


def test_epochs_become_iterations():
    cfg = load_config(CONFIG, ["train.epochs=2.5", "dataloader.train.total_batch_size=8"])
    set_length(cfg, num_images=30)
    assert cfg.train.max_iter == 10  # ceil(2.5 * 30 / 8)


def test_missing_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="train.device is cuda, but torch sees no CUDA device"):
        resolve_config(load_config(CONFIG, ["train.device=cuda"]))


def test_detectron2s_own_config_needs_no_setting_of_ours(tmp_path):
    path = tmp_path / "stock.py"
    path.write_text(
        "from detectron2 import model_zoo\n"
        "_cfg = model_zoo.get_config('COCO-Detection/retinanet_R_50_FPN_1x.py')\n"
        "model, dataloader, optimizer = _cfg.model, _cfg.dataloader, _cfg.optimizer\n"
        "lr_multiplier, train = _cfg.lr_multiplier, _cfg.train\n"
    )
    cfg = load_config(str(path), ["train.device=cpu", "train.epochs=1"])
    resolve_config(cfg)
    set_length(cfg, num_images=160)
    assert (cfg.train.max_iter, cfg.train.seed, cfg.model.num_classes) == (10, -1, 80)


@pytest.mark.parametrize("config", ["student_s_512", "student_s_640", "dfd_b_s_512", "dfd_b_s_640"])
def test_recipes_for_a_small_gpu_do_not_force_what_it_may_not_have(config):
    cfg = load_config(f"configs/vitdet/{config}.py", ())
    assert cfg.train.amp.enabled == "auto"


def test_automatic_fp16_needs_cuda_alone(monkeypatch):
    monkeypatch.setattr("dfd.engine.config.resolve.resolve_precision", lambda *_: torch.bfloat16)
    overrides = ["train.device=cpu", "model.roi_heads.num_classes=3", "train.amp.dtype=fp16"]
    cfg = load_config("configs/demo/student.py", overrides)
    resolve_config(cfg)
    assert cfg.train.amp.enabled is False


@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float32])
def test_automatic_mixed_precision_where_the_device_gains_from_it(monkeypatch, fast):
    monkeypatch.setattr("dfd.engine.config.resolve.resolve_precision", lambda *_: fast)
    overrides = ["train.device=cpu", "model.roi_heads.num_classes=3"]
    cfg = load_config("configs/demo/student.py", overrides)
    assert cfg.train.amp.enabled == "auto"
    resolve_config(cfg)
    assert cfg.train.amp.enabled is (fast == torch.bfloat16)


def test_automatic_values_behind_a_reference_are_filled_in():
    """As of a teacher chosen by name among several."""
    MetadataCatalog.get("four_classes").thing_classes = list("abcd")
    chosen = "model.teacher=${teachers.retinanet}"
    data = "dataloader.train.dataset=four_classes"
    cfg = load_config("configs/study_families/dfd_yolox.py", [chosen, data, "train.device=cpu"])
    cfg.teachers.retinanet.update(checkpoint="", allow_random=True)
    teacher = instantiate(resolve_config(cfg).model.teacher)
    assert teacher.model.num_classes == 4


@pytest.mark.parametrize(("whole", "expected"), [("RGB", "RGB"), (None, "BGR")])
def test_automatic_order_of_the_loaders_is_what_the_student_is_given(whole, expected):
    """A setting beside the student comes before the student's own."""
    model = {"student": {"input_format": "BGR"}, "input_format": whole}
    loader = {"mapper": {"image_format": "auto"}}
    cfg = OmegaConf.create({"model": model, "dataloader": {"train": loader}})
    resolve_pixels(cfg)
    assert cfg.dataloader.train.mapper.image_format == expected


def test_student_starts_the_same_wherever_its_teacher_is_written(data, configs, tmp_path):
    """Each part takes random numbers: what is made first, another's students begin with."""
    path = tmp_path / "teacher_first.py"
    path.write_text(
        "from detectron2.config import LazyCall as L, LazyConfig\n"
        "from dfd import DistilledDetector\n"
        f"_base = LazyConfig.load({os.path.abspath(configs['dfd'])!r})\n"
        "dataloader, optimizer, train = _base.dataloader, _base.optimizer, _base.train\n"
        "lr_multiplier = _base.lr_multiplier\n"
        "model = L(DistilledDetector)(\n"
        "    teacher=_base.model.teacher, head=_base.model.head, student=_base.model.student\n"
        ")\n"
    )
    weights = []
    for config in (configs["dfd"], configs["student"], str(path)):
        more = ["train.device=cpu"]
        more += [] if config == configs["student"] else ["model.teacher.allow_random=True"]
        cfg = resolve_config(load_config(config, [*data, *more]))
        torch.manual_seed(0)
        student = student_of(build_model(cfg))
        weights.append(student.state_dict()["backbone.fpn_output3.weight"])
    assert all(torch.equal(weights[0], other) for other in weights[1:])

"""What counts as another run: settings by key, defaults of functions, names of functions."""

import sys
import types

import pytest
import torch
from omegaconf import OmegaConf
from toys import build

from dfd.engine.config.flat import differing, flat_settings
from dfd.engine.config.load import load_config
from dfd.engine.config.names import public_name
from dfd.engine.optim import parameter_groups
from dfd.engine.state.run_settings import TRAINING_DATA, changed_settings, run_settings
from dfd.errors import UserError

LEFT = "settings left to defaults"


def optimizer(lr=0.1, decay=0.0, betas=(0.9, 0.99), names=None): ...


def upgraded(lr=0.1, decay=0.0, betas=(0.9, 0.99), names=None, fused=None, extra=(1, 2)): ...


def other_default(lr=0.1, decay=0.5, betas=(0.9, 0.99), names=None): ...


def downgraded(lr=0.1): ...


@pytest.fixture
def settings(monkeypatch):
    """The settings of a run whose optimizer is made by a version of a function of one name."""

    def call(function, **given):
        module = types.ModuleType("version")
        module.optimizer = function
        function.__qualname__, function.__module__ = "optimizer", "version"
        monkeypatch.setitem(sys.modules, "version", module)
        parts = {"model": {}, "dataloader": {}, "lr_multiplier": {}, "train": {}}
        parts["optimizer"] = {"_target_": "version.optimizer", **given}
        return run_settings(OmegaConf.create(parts), None, 8)

    return call


def of_an_older_version(settings):
    """As they were kept before defaults were: with the defaults of this project's own functions."""
    return {key: text for key, text in settings.items() if key != LEFT}


@pytest.mark.parametrize("older", [False, True])
def test_parameter_that_is_new_is_no_change_at_its_default(settings, older):
    began = settings(optimizer)
    began = of_an_older_version(began) if older else began
    assert changed_settings(began, settings(upgraded)) == []
    assert changed_settings(began, settings(upgraded, fused=None, extra=[1, 2])) == []
    for given in ({"fused": True}, {"extra": [1]}, {"extra": [1, 2, 3]}):
        with pytest.raises(UserError, match=f"optimizer.{next(iter(given))}.*cannot change"):
            changed_settings(began, settings(upgraded, **given))


def test_parameter_that_is_gone_is_no_change_if_it_was_at_its_default(settings):
    assert changed_settings(settings(upgraded), settings(optimizer)) == []
    assert changed_settings(settings(upgraded, decay=0), settings(downgraded)) == []
    with pytest.raises(UserError, match="optimizer.fused is not set, was True"):
        changed_settings(settings(upgraded, fused=True), settings(optimizer))


def test_older_run_goes_on_without_a_parameter_that_is_gone_and_tells_it(settings):
    began = of_an_older_version(settings(optimizer))
    found = changed_settings(began, settings(downgraded))
    assert "optimizer.decay is not set, was 0.0" in found


def test_run_from_before_there_was_a_warmup_of_the_ema_goes_on_without_one():
    def kept(**ema):
        parts = {part: {} for part in ("model", "dataloader", "optimizer", "lr_multiplier")}
        cfg = OmegaConf.create(parts | {"train": {"ema": ema}})
        return run_settings(cfg, None, 8)

    began = kept(decay=0.9)
    assert changed_settings(began, kept(decay=0.9, warmup=None)) == []
    assert changed_settings(began, kept(decay=0.9, warmup=2000)) == [
        "train.ema.warmup is 2000, was not set"
    ]


@pytest.mark.parametrize("older", [False, True])
def test_other_value_of_a_default_is_a_change(settings, older):
    began = settings(optimizer)
    began = of_an_older_version(began) if older else began
    with pytest.raises(UserError, match="optimizer.decay is 0.5, was 0.0"):
        changed_settings(began, settings(other_default))
    assert changed_settings(began, settings(other_default, decay=0.0)) == []


def test_other_function_is_a_change(settings):
    began = settings(optimizer) | {"optimizer._target_": "version.another"}
    with pytest.raises(UserError, match="optimizer._target_ is version.optimizer, was version.ano"):
        changed_settings(began, settings(optimizer))


def test_default_may_be_written_out_or_left_out(settings):
    one, other = settings(optimizer), settings(optimizer, betas=[0.9, 0.99], decay=0, lr=1e-1)
    assert changed_settings(one, other) == changed_settings(other, one) == []


@pytest.fixture
def real():
    """The settings of a real config."""
    cfg = load_config("tests/engine/configs/dfd.py")
    cfg.dataloader.train.dataset = cfg.dataloader.test.dataset = "x"
    cfg.optimizer.params.model = build()
    return run_settings(cfg, None, 8)


@pytest.mark.parametrize(
    ("key", "older"),
    [
        ("optimizer._target_", "torch.optim.adamw.AdamW"),  # Where torch defines it today,
        ("optimizer._target_", "torch.optim._moved.AdamW"),  # and where it may have.
        ("optimizer.params._target_", "dfd.optim.parameter_groups"),
        ("optimizer.params._target_", "dfd.engine.optim.groups.rules.parameter_groups"),
        ("optimizer.params.model", "detectron2.modeling.meta_arch.rcnn.GeneralizedRCNN"),
        ("lr_multiplier._target_", "detectron2.solver.lr_scheduler.WarmupParamScheduler"),
        ("model.head._target_", "dfd.distill.head.DFDHead"),
    ],
)
def test_function_that_has_moved_is_no_change(real, key, older):
    assert changed_settings(real | {key: older}, real) == []


def test_function_moved_by_this_project_keeps_its_old_name(real, monkeypatch):
    module = types.ModuleType("dfd.optimizer_groups")
    monkeypatch.setitem(sys.modules, "dfd.optimizer_groups", module)
    module.parameter_groups = parameter_groups
    monkeypatch.setattr(parameter_groups, "__module__", "dfd.optimizer_groups")
    moved = real | {"optimizer.params._target_": public_name(parameter_groups)}
    assert moved != real and changed_settings(real, moved) == []


def test_function_moved_to_another_package_keeps_its_old_name(tmp_path, monkeypatch):
    (tmp_path / "moved_to.py").write_text("def make(): ...\n")
    (tmp_path / "moved_from.py").write_text("from moved_to import make\n")
    monkeypatch.syspath_prepend(tmp_path)
    for then, now in (("moved_from.make", "moved_to.make"), ("moved_gone.make", "moved_to.make")):
        found = differing(*(flat_settings({"_target_": name}) for name in (then, now)))
        assert found == ([] if then == "moved_from.make" else ["_target_"])
    settings = {"optimizer._target_": "moved_from.make"}
    assert changed_settings(settings, {"optimizer._target_": "moved_to.make"}) == []


@pytest.mark.parametrize("older", ["torch.optim.SGD", "torch.optim.sgd.SGD", "mine.AdamW", "AdamW"])
def test_other_optimizer_is_refused(real, older):
    with pytest.raises(UserError, match=f"optimizer._target_ is torch.optim.AdamW, was {older}"):
        changed_settings(real | {"optimizer._target_": older}, real)


def test_settings_of_a_run_that_are_new_are_told_only_if_they_are_used(real):
    began = {key: text for key, text in real.items() if not key.startswith("train.ema")}
    assert changed_settings(began, real) == []
    used = real | {"train.ema.decay": "0.9"}
    used[LEFT] = used[LEFT].replace("train.ema.decay", "")
    assert changed_settings(began, used) == ["train.ema.decay is 0.9, was not set"]


def test_public_names():
    assert public_name(torch.optim.AdamW) == "torch.optim.AdamW"
    assert public_name(torch.nn.LayerNorm(1)) == "torch.nn.LayerNorm"
    assert public_name(parameter_groups) == "dfd.engine.optim.parameter_groups"
    assert public_name(test_public_names) == f"{__name__}.test_public_names"


def test_names_in_a_file_import_nothing_that_is_not_there():
    before = set(sys.modules)
    one, other = ({"x": text} for text in ("antigravity.x", "antigravity.y"))
    assert differing(flat_settings(one), flat_settings(other)) == ["x"]
    assert "antigravity" not in set(sys.modules) - before


def test_number_of_images_without_labels_is_that_of_the_run():
    """Another one is another stream of data; older runs did not count them."""
    key, rest = "the number of images without labels", {"settings left to defaults": ""}
    assert changed_settings({key: "6", **rest}, {key: "6", **rest}) == []
    assert changed_settings(rest, {key: "10", **rest}) == []
    with pytest.raises(UserError, match=f"{key} is 10, was 6: it cannot change within a run"):
        changed_settings({key: "6", **rest}, {key: "10", **rest})


def test_training_data_that_change_within_a_run_are_told():
    began, now = {TRAINING_DATA: "a", "x": "1"}, {TRAINING_DATA: "b", "x": "1"}
    assert changed_settings(began, now) == [f"{TRAINING_DATA} is b, was a"]
    assert changed_settings({"x": "1"}, now) == []  # Of a version that kept none.

"""config.yaml of a run: read as data. What it names is not called, whoever reads it."""

import functools
import json
import shutil

import evil
import pytest
import torch
import yaml
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.structures import BoxMode
from omegaconf import OmegaConf
from torch import nn
from toys import instantiate_seeded

from dfd.engine.config.load import load_config
from dfd.engine.config.saved import ForeignCodeError, find_part, read_config
from dfd.engine.run import draw_seed, write_config
from dfd.errors import UserError
from dfd.losses import DFDLoss
from dfd.research import load_runs
from dfd.research.analyse.load import load_run

# Each would make the file "pwned".
CALLS = {
    "apply": "!!python/object/apply:os.system ['touch pwned']",
    "apply with a mapping": "!!python/object/apply:os.system {args: ['touch pwned']}",
    "new": "!!python/object/new:subprocess.Popen [['touch', 'pwned']]",
    "eval": "!!python/object/apply:builtins.eval ['open(\"pwned\", \"w\")']",
    "state": "!!python/object/new:tuple [!!python/object/new:map "
    "[!!python/name:builtins.eval , ['open(\"pwned\", \"w\")']]]",
    "module": "!!python/module:antigravity",
    "partial": "!!python/object/apply:functools.partial {args: [], state: !!python/tuple "
    "[!!python/object/apply:os.system ['touch pwned'], !!python/tuple [], {}, null]}",
}
# Reading them does nothing; building what they describe would.
TARGETS = {
    "target": "{_target_: os.system, command: touch pwned}",
    "target through a module of ours": "{_target_: dfd.demo.shapes.os.system, command: x}",
    "target that a resolver makes": "\"${oc.create:{_target_: os.system, command: 'x'}}\"",
    "target by name": "{_target_: !!python/name:os.system , command: touch pwned}",
    "function as a setting": "{_target_: torch.nn.Module, hook: !!python/name:os.system }",
    "weights of a pickle": "{_target_: detectron2.data.build.get_detection_dataset_dicts, "
    "names: x, proposal_files: [evil.pkl]}",
    "target of another package": "{_target_: toys.adapter_with_a_spare}",
}


def training_config(value):
    return f"model: {value}\n" + "".join(
        f"{part}: {{seed: 3, teacher: {{sha256: x}}, student: 1}}\n"
        for part in ("dataloader", "optimizer", "lr_multiplier", "train")
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run's folder, which is also where a mark would be left."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"results": {"bbox": {"AP": 1.0}}}))
    (tmp_path / "metrics.json").write_text('{"iteration": 0}\n')
    (tmp_path / "model_final.pth").touch()
    return tmp_path


READERS = {
    "report": lambda f: load_runs({"a": str(f)}),
    "analysis": lambda f: load_run(str(f)),
    "--config-file": lambda f: load_config(str(f / "config.yaml")),
    "seed of a resumed run": lambda f: draw_seed(str(f), resume=True),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("call", CALLS)
def test_yaml_that_would_run_code_leaves_no_mark(folder, reader, call):
    (folder / "config.yaml").write_text(training_config(CALLS[call]))
    if reader == "seed of a resumed run":  # Needs no more than the number.
        try:
            assert READERS[reader](folder) == 3
        except UserError as error:
            assert "set train.seed" in str(error)
    else:
        with pytest.raises(UserError) as error:
            READERS[reader](folder)
        assert "config.yaml" in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "pwned").exists()


@pytest.mark.parametrize("reader", ["report", "analysis"])
@pytest.mark.parametrize("target", TARGETS)
def test_config_of_a_run_names_parts_of_detectors_alone(folder, reader, target):
    (folder / "config.yaml").write_text(training_config(TARGETS[target]))
    with pytest.raises(UserError, match="config.yaml is not read: it names") as error:
        READERS[reader](folder)
    assert "--trust-code" in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "pwned").exists()


def test_pickle_beside_the_config_is_never_read(folder):
    evil.write(folder / "config.yaml.pkl", evil.Evil())
    for text in (training_config("{}"), "model: [", ""):
        (folder / "config.yaml").write_text(text)
        for read in READERS.values():
            try:
                read(folder)
            except UserError:
                pass
    assert not (folder / "pwned").exists()


def test_own_code_can_be_trusted(folder):
    (folder / "config.yaml").write_text(training_config(TARGETS["target of another package"]))
    assert load_runs({"a": str(folder)}, trusted=True)[0].cfg.model._target_


@pytest.mark.parametrize(
    ("file", "content"),
    [("summary.json", text) for text in ("", "[", "[]", "3", '"x"', "null", '{"results": [1]}')]
    + [("metrics.json", text) for text in ("[", "[]", "3", '"x"', "null")],
)
def test_other_files_of_another_kind_are_one_line(folder, file, content):
    (folder / "config.yaml").write_text(training_config("{}"))
    (folder / file).write_text(content)
    with pytest.raises(UserError) as error:
        load_runs({"a": str(folder)})
    assert "--run a" in str(error.value) and "\n" not in str(error.value)


VALUES = {
    "tuple": (1, 2.5),
    "class": nn.LayerNorm,
    "function": nn.functional.relu,
    "partial": functools.partial(nn.LayerNorm, eps=1e-6),
    "enumeration": BoxMode.XYXY_ABS,
    "numbers": [1e-5, float("inf"), True, None],
    "call": L(DFDLoss)(weight=2.0),
    "text": "Müller's ~/data: #1",
}


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("kind", VALUES)
def test_what_a_run_saves_is_read_back(tmp_path, kind, trusted):
    path = tmp_path / "config.yaml"
    cfg = OmegaConf.create({"x": VALUES[kind]}, flags={"allow_objects": True})
    LazyConfig.save(cfg, str(path))
    found = read_config(str(path), trusted=trusted).x
    if kind == "partial":
        assert (found.func, found.keywords) == (nn.LayerNorm, {"eps": 1e-6})
    elif kind == "call":
        assert found == {"_target_": "dfd.losses.DFDLoss", "weight": 2.0}
    else:
        assert found == cfg.x


def test_saved_config_is_what_detectron2_reads(tmp_path):
    path = str(tmp_path / "config.yaml")
    LazyConfig.save(load_config("configs/vitdet/dfd_b_s_512.py"), path)
    assert read_config(path, trusted=False) == LazyConfig.load(path)


def test_name_of_nothing_is_told(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.dump({"x": 1}) + "y: !!python/name:torch.nn.Absent\n")
    with pytest.raises(ForeignCodeError, match="torch.nn.Absent, which is not there"):
        read_config(str(path), trusted=True)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet", "reppoints", "yolox"])
def test_run_from_a_saved_config_begins_with_the_same_weights(kind, tmp_path):
    """In the order in which a config names the parts of a model they draw their first weights."""
    overrides = ["model.num_classes=3"]
    if kind == "faster_rcnn":
        overrides = ["model.roi_heads.num_classes=3"]
    elif kind == "reppoints":
        overrides.append("model.head.num_classes=3")
    config = f"configs/study_families/student_{kind}.py"
    cfg = load_config(config, [*overrides, f"train.output_dir={tmp_path}"])
    write_config(cfg)
    again = load_config(str(tmp_path / "config.yaml"))
    first, second = (instantiate_seeded(c.model).state_dict() for c in (cfg, again))
    assert list(first) == list(second)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize(
    "name",
    [
        "dfd.data.generated_shapes",
        "dfd.optim.parameter_groups",
        "dfd.schedule.QuadraticWarmupCosine",
        "dfd.DistilledDetector",
        "dfd.losses.DFDLoss",
    ],
)
def test_names_of_earlier_saved_configs_are_still_parts(name):
    assert find_part(name).__name__ == name.rpartition(".")[2]

"""key=value arguments: text as a shell gives it where a key takes text, else Hydra's grammar."""

import copy
import os
from pathlib import Path

import pytest
from coco_files import write_coco
from detectron2.config import LazyCall as L
from omegaconf import OmegaConf

from dfd.data import build_evaluator, coco_json
from dfd.engine.config.grammar import override
from dfd.engine.config.load import load_config
from dfd.engine.config.overrides import apply_overrides
from dfd.engine.config.parameters import check_switches
from dfd.errors import UserError
from dfd.research import parse_runs
from dfd.research.ablate import make_cells
from dfd.weights.strict import local_path

TEXTS = [
    *("/data/my data (new) [1]/a=b/Müller's/~x", "~/x.pth", "~", "a,b", "a:b#c$d", "$x/%y"),
    *("2007", "007", "0", "1e3", "-1", "true", "None", "a\\b\\", "\\", " blanks ", "\ttab"),
    *("'", "it's \"both\"", "'a' b'", "{a: b}", "[x]", "a\nb", "range(1,3)", "a?*", "", "é", "|&!"),
]
TEXT_KEYS = [
    "dataloader.train.dataset.root",
    "dataloader.train.dataset.split",
    "dataloader.test.dataset.root",  # A reference to the one of the training.
    "dataloader.evaluator.output_dir",
    "dataloader.train.mapper.image_format",
    "model.teacher.checkpoint",
    "train.init_checkpoint",
    "train.wandb.project",
    "train.output_dir",
]


@pytest.fixture(scope="module")
def loaded():
    return load_config("configs/bccd/dfd.py")


@pytest.fixture
def cfg(loaded):
    return copy.deepcopy(loaded)


def function(
    plain: str = "",
    perhaps: str | None = None,
    path: os.PathLike = "",
    implicit: str = None,
    mixed: bool | str = False,
    name_or_number: "str | int" = "",
    number: int = 1,
    switch: bool = False,
    perhaps_switch: bool | None = None,
    unknown="",
    unknown_switch=True,
): ...


@pytest.fixture
def call():
    return OmegaConf.create({"f": L(function)(unknown="x")}, flags={"allow_objects": True})


@pytest.mark.parametrize("key", TEXT_KEYS)
def test_text_is_taken_as_a_shell_gives_it(cfg, key):
    for text in TEXTS:
        value = OmegaConf.select(apply_overrides(cfg, [f"{key}={text}"]), key)
        assert value == text and isinstance(value, str)


@pytest.mark.parametrize("key", ["plain", "perhaps", "path", "implicit", "unknown"])
def test_what_takes_text_is_told_by_the_function_or_by_what_is_there(call, key):
    for text in TEXTS:
        assert apply_overrides(call, [f"f.{key}={text}"]).f[key] == text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("f.plain=null", "null"),
        ("f.perhaps=null", None),
        ("f.implicit=null", None),
        ("f.perhaps='null'", "null"),
        # Quotes that enclose all of it are Hydra's, as ever.
        ("f.plain='it\\'s'", "it's"),
        ('f.plain="a b"', "a b"),
        ("f.plain='2007'", "2007"),
        ("f.plain=''", ""),
        ("f.plain='a' and 'b'", "'a' and 'b'"),
        # A reference stays one.
        ("f.plain=${f.unknown}/x", "x/x"),
        ("f.plain=\\${f.number}", "${f.number}"),
        # Text among others: what it can be otherwise, it is.
        ("f.mixed=true", True),
        ("f.mixed=2007", "2007"),
        ("f.mixed=/my data (new)/x.pth", "/my data (new)/x.pth"),
        ("f.mixed=~/x.pth", "~/x.pth"),
        ("f.name_or_number=2007", 2007),
        ("f.number=1", 1),
        ("f.number=[1,2]", [1, 2]),
        ("f.plain={_target_: builtins.dict, a: 1}", {"_target_": "builtins.dict", "a": 1}),
    ],
)
def test_value(call, override, value):
    found = apply_overrides(call, [override])
    key = override.partition("=")[0]
    assert OmegaConf.select(found, key) == value


def test_another_function_takes_over_no_setting():
    """What is merged are the settings of the function that is there already."""
    cfg = OmegaConf.create({"f": {"_target_": "builtins.dict", "a": 1}})
    merged = apply_overrides(cfg, ["f={_target_: builtins.dict, b: 2}"])
    assert merged.f == {"_target_": "builtins.dict", "a": 1, "b": 2}
    other = apply_overrides(merged, ["f={_target_: collections.OrderedDict, c: 3}"])
    assert other.f == {"_target_": "collections.OrderedDict", "c": 3}
    # What joins the parts of a config is no setting.
    params = {"_target_": "dfd.engine.optim.parameter_groups"}
    sgd = {"_target_": "torch.optim.SGD", "params": params, "momentum": 0.9}
    cfg = apply_overrides(
        OmegaConf.create({"optimizer": sgd}), ["optimizer={_target_: torch.optim.Adam, lr: 0.1}"]
    )
    assert cfg.optimizer == {"_target_": "torch.optim.Adam", "lr": 0.1, "params": params}


@pytest.mark.parametrize("key", ["switch", "perhaps_switch", "unknown_switch"])
@pytest.mark.parametrize("word", ["no", "off", "No", "n", "yes", "'no'", "'off'"])
def test_word_is_no_switch(call, key, word):
    """Any text is true to Python: "no" would switch it on."""
    with pytest.raises(UserError, match=f"override f.{key}={word}: it must be true or false"):
        apply_overrides(call, [f"f.{key}={word}"])
    # In place of a value that is there, too.
    call.f[key] = False
    with pytest.raises(UserError, match="it must be true or false"):
        apply_overrides(call, [f"f.{key}={word}"])


@pytest.mark.parametrize("key", ["switch", "perhaps_switch", "unknown_switch"])
@pytest.mark.parametrize(
    ("text", "value"),
    [("false", False), ("False", False), ("TRUE", True), ("null", None), ("${f.other}", False)],
)
def test_switch(call, key, text, value):
    call.f.other = False
    assert apply_overrides(call, [f"f.{key}={text}"]).f[key] is value


def test_what_is_text_in_place_of_a_switch_stays_text(call):
    """A parameter that says no type, false by default, may take a path too."""
    call.f.unknown_switch = "x"
    for text in TEXTS:
        assert apply_overrides(call, [f"f.unknown_switch={text}"]).f.unknown_switch == text


@pytest.mark.parametrize("key", ["switch", "perhaps_switch", "unknown_switch"])
@pytest.mark.parametrize("form", ["py", "yaml"])
@pytest.mark.parametrize("word", ["no", "Off", "yes"])
def test_word_is_no_switch_in_a_config_either(tmp_path, key, form, word):
    text = "from test_overrides import function\nfrom detectron2.config import LazyCall as L\n"
    lines = {
        "py": f"{text}model = dict(parts=[L(function)({key}={word!r})])\ntrain = {{}}\n"
        "dataloader = optimizer = lr_multiplier = dict()\n",
        "yaml": f"model: {{parts: [{{_target_: test_overrides.function, {key}: '{word}'}}]}}\n"
        "train: {}\ndataloader: {}\noptimizer: {}\nlr_multiplier: {}\n",
    }
    path = tmp_path / f"config.{form}"
    path.write_text(lines[form])
    with pytest.raises(UserError, match=rf"^model.parts.0.{key} is '{word}': it must be true or"):
        load_config(str(path))
    path.write_text(lines[form].replace(word, "what").replace(key, "mixed"))
    load_config(str(path))


def test_word_is_no_switch_of_a_function_that_is_named_elsewhere():
    cfg = {"name": "dfd.losses.DFDLoss", "parts": [{"_target_": "${name}", "certainty": "no"}]}
    with pytest.raises(UserError, match=r"^parts.0.certainty is 'no': it must be true or false"):
        check_switches(OmegaConf.create(cfg))


def test_switch_of_a_section_is_no_word():
    cfg = OmegaConf.create({"a": {"on": False, "auto": False}})
    with pytest.raises(UserError, match="it must be true or false"):
        apply_overrides(cfg, ["a.on=no"])
    # What is no such word may be a choice of whoever reads it.
    assert apply_overrides(cfg, ["a.auto=auto"]).a.auto == "auto"


@pytest.mark.parametrize("text", [text for text in TEXTS if text.strip() == text and text])
def test_quoted_path_is_read_as_the_path(cfg, text):
    """As the tools pass on the folders that they are given."""
    for key in ("dataloader.train.dataset.root", "dataloader.evaluator.output_dir"):
        found = apply_overrides(cfg, [override(key, Path(text))])
        assert OmegaConf.select(found, key) == str(Path(text))


@pytest.mark.parametrize("text", ["a/${train.seed}", "a\\${b}", "a${b"])
def test_path_of_a_tool_is_no_reference(cfg, text):
    key = "dataloader.train.dataset.root"
    assert OmegaConf.select(apply_overrides(cfg, [override(key, Path(text))]), key) == text


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.max_iter=[1", "train.max_iter=[1: its value cannot be read: close its brackets"),
        ("train.max_iter=a(b)", "train.max_iter=a(b): its value cannot be read"),
        ("train.max_iter=1,2", "is several values"),
        ("train.max_iter=range(1,3)", "is several values"),
        ("train.max_iter", "it must be key=value: train.max_iter"),
        ("=3", "it must be key=value: =3"),
        ("~train.seed", "cannot be deleted"),
        ("~train.seed=0", "cannot be deleted"),
        ("train.output_dir=a${b", "${ begins a reference"),
        ("train.max_iter=a\nb\x00(", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_told_in_words(cfg, override, named):
    with pytest.raises(UserError) as error:
        apply_overrides(cfg, [override])
    assert named in str(error.value) and "\n" not in str(error.value)
    for word in ("token", "EOF", "viable", "Hydra", "LexerNoViable"):
        assert word not in str(error.value)


def test_section_cannot_become_a_number():
    with pytest.raises(UserError, match="train is 3"):
        load_config("configs/bccd/student.py", ["train=3"])


def test_home_is_where_a_path_begins_with_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = load_config("configs/bccd/student.py", ["train.output_dir=~/${train.seed}/~"])
    assert cfg.train.output_dir == f"{tmp_path}/0/~"
    assert parse_runs(["a=~/run", "b=x/~"]) == {"a": f"{tmp_path}/run", "b": "x/~"}


def test_home_is_where_each_path_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    paths = [text.partition("=")[2] for text in write_coco(tmp_path, "here", 3)]
    json, images = (f"~{path.removeprefix(str(tmp_path))}" for path in paths)
    dataset = coco_json(json=json, images=images, num_images=2)  # So that a file is written.
    build_evaluator(dataset=dataset, output_dir="~/kept")
    assert list((tmp_path / "kept").iterdir())
    (tmp_path / "weights.pth").touch()
    assert local_path("~/weights.pth", "x") == str(tmp_path / "weights.pth")
    (tmp_path / "config.py").write_text("x = dict()")
    with pytest.raises(UserError, match=f"{tmp_path}/config.py defines no model"):
        load_config("~/config.py")
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("grid", "values"),
    [
        ("k=[0,007,1e3,true]", ["k=0", "k=007", "k=1e3", "k=true"]),
        ("k=[~/x, /my data (new) [1]/b's]", ["k='~/x'", "k='/my data (new) [1]/b\\'s'"]),
        ("k=['a, b','it\\'s']", ["k='a, b'", "k='it\\'s'"]),
        ("+k=[[a,b],{c: d}]", ["+k=[a,b]", "+k={c:d}"]),
    ],
)
def test_cells_of_a_grid_take_paths(grid, values):
    assert [cell.overrides[0] for cell in make_cells(grids=[grid])] == values


def test_cell_takes_a_path_as_a_shell_does():
    (cell,) = make_cells(variants=["x=dataloader.train.dataset.root='/a b (c)/d=e'"])
    assert cell.overrides == ("dataloader.train.dataset.root=/a b (c)/d=e",)


@pytest.mark.parametrize("grid", ["k=[1,,2]", "k=[", "k=1", "k", "k=[[1,2]", "k=[range(1,3)]"])
def test_grid_that_cannot_be_read(grid):
    with pytest.raises(UserError, match="--grid") as error:
        make_cells(grids=[grid])
    assert "\n" not in str(error.value)

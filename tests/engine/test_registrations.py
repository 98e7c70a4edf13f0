"""Datasets registered in a config file, which one process may run more than once."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from dfd.engine.config.load import load_config
from dfd.errors import UserError

BODY = """
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
model, dataloader, optimizer, lr_multiplier = dict(x=1), dict(x=1), dict(x=1), dict(x=1)
train = dict(output_dir="x")
"""
FUNCTION = """
import numpy as np
ROOT = {root!r}
def load():
    return [dict(file_name=ROOT)]
DatasetCatalog.register("test_mine", load)
MetadataCatalog.get("test_mine").thing_classes = ["a", "b"]
MetadataCatalog.get("test_mine").set(weights=np.array({weights}))
"""
COCO = 'register_coco_instances("test_mine", {{}}, "{root}.json", "{root}")\n'


@pytest.fixture(autouse=True)
def forget():
    yield
    for catalog in (DatasetCatalog, MetadataCatalog):
        if "test_mine" in catalog:
            catalog.pop("test_mine")


@pytest.fixture
def write(tmp_path):
    def call(name, text):
        path = tmp_path / f"{name}.py"
        path.write_text(BODY + text)
        return str(path)

    return call


@pytest.mark.parametrize("text", [FUNCTION.format(root="a", weights=[1, 2]), COCO.format(root="a")])
def test_config_may_be_read_again(write, text):
    path = write("config", text)
    for _ in range(3):
        load_config(path)
    assert "test_mine" in DatasetCatalog


def test_config_that_others_import_runs_many_times_at_once(write, tmp_path):
    write("base", FUNCTION.format(root="a", weights=[1, 2]))
    for name in ("one", "two"):
        parts = "dataloader, lr_multiplier, model, optimizer, train"
        (tmp_path / f"{name}.py").write_text(
            f"from .base import {parts}\nfrom .base import model as _again\n"
        )
        load_config(str(tmp_path / f"{name}.py"))
    assert DatasetCatalog.get("test_mine") == [{"file_name": "a"}]


def test_changed_config_counts_when_it_is_read_again(write):
    load_config(write("config", FUNCTION.format(root="a", weights=[1, 2])))
    load_config(write("config", FUNCTION.format(root="b", weights=[3])))
    assert DatasetCatalog.get("test_mine") == [{"file_name": "b"}]
    assert MetadataCatalog.get("test_mine").weights.tolist() == [3]


@pytest.mark.parametrize("text", ["FUNCTION", "COCO"])
def test_other_config_may_register_the_same_but_nothing_else(write, text):
    def filled(root):
        return globals()[text].format(root=root, weights=[1, 2]).replace("np.array", "list")

    load_config(write("one", filled("a")))
    load_config(write("two", filled("a")))
    with pytest.raises(UserError) as error:
        load_config(write("three", filled("b")))
    assert "three.py cannot be loaded" in str(error.value)
    assert "'test_mine' is already registered by" in str(error.value)
    assert "one.py as something else" in str(error.value) and "\n" not in str(error.value)


def test_other_metadata_of_another_config_is_told(write):
    line = 'MetadataCatalog.get("test_mine").thing_classes = {}\n'
    load_config(write("one", line.format(["a"])))
    load_config(write("two", line.format(["a"])))
    with pytest.raises(UserError, match="'thing_classes' in the metadata of 'test_mine' cannot"):
        load_config(write("three", line.format(["b"])))


def test_name_taken_twice_within_one_config_is_told(write):
    loop = 'for s in "ab": DatasetCatalog.register("test_mine", lambda s=s: s)\n'
    with pytest.raises(UserError, match="already registered"):
        load_config(write("config", loop))


def test_name_of_detectron2s_own_is_told(write):
    with pytest.raises(UserError, match="'coco_2017_val' is already registered"):
        load_config(write("config", 'DatasetCatalog.register("coco_2017_val", lambda: [])\n'))


def test_registering_elsewhere_is_as_strict_as_before(write):
    load_config(write("config", COCO.format(root="a")))
    with pytest.raises(AssertionError):
        DatasetCatalog.register("test_mine", lambda: [])

import copy
import functools
from pathlib import Path

import pytest
from coco_files import write_coco
from detectron2.config import LazyConfig


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Overrides that name a small COCO dataset for training and testing."""
    folder = tmp_path_factory.mktemp("coco")
    train = [f"dataloader.train.{o}" for o in write_coco(folder, "train", 8)]
    test = [f"dataloader.test.{o}" for o in write_coco(folder, "val", 3, seed=1)]
    return train + test


@pytest.fixture(scope="session")
def configs():
    """Paths of the toy configs by name; teacher, student and dfd belong together."""
    return {path.stem: str(path) for path in Path("tests/engine/configs").glob("*.py")}


@pytest.fixture(scope="session", autouse=True)
def configs_loaded_once(configs):
    """Every run has a copy of its toy config, which does not change: loading takes its time."""
    load = LazyConfig.load
    once = functools.cache(load)
    paths = {str(Path(path).resolve()) for path in configs.values()}

    def load_or_copy(filename, *args, **kwargs):
        if args or kwargs or str(Path(filename).resolve()) not in paths:
            return load(filename, *args, **kwargs)
        return copy.deepcopy(once(str(Path(filename).resolve())))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LazyConfig, "load", staticmethod(load_or_copy))
        yield

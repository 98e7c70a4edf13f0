from pathlib import Path

import pytest
from coco_files import write_coco


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

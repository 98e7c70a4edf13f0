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
    """Paths of a toy teacher's, a toy plain student's and a toy distilled student's config."""
    return {name: f"tests/engine/configs/{name}.py" for name in ("teacher", "student", "dfd")}

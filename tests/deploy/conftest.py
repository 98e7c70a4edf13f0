"""A finished run for all that is done with its student."""

from pathlib import Path

import pytest
from coco_files import write_coco
from commands import run as train
from pycocotools.coco import COCO


@pytest.fixture(scope="package")
def finished(tmp_path_factory):
    """A distilled run of one iteration, and the folder of its test images."""
    folder = tmp_path_factory.mktemp("finished")
    data = {"train": write_coco(folder, "train", 4), "test": write_coco(folder, "val", 3, seed=1)}
    train(
        "tests/engine/configs/dfd.py",
        *(f"dataloader.{split}.{o}" for split, opts in data.items() for o in opts),
        "train.max_iter=1",
        "train.ema.decay=0.9",
        "train.eval_period=1",
        "train.best_checkpoint.metric=bbox/AP",
        "model.teacher.allow_random=true",
        f"train.output_dir={folder / 'run'}",
    )
    truth = COCO(next(o.split("=", 1)[1] for o in data["test"] if ".json=" in o))
    images = next(Path(o.split("=", 1)[1]) for o in data["test"] if ".images=" in o)
    return folder / "run", images, truth

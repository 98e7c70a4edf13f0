"""A program takes images of one size: they are what the evaluation sees wherever they can be."""

import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from omegaconf import OmegaConf

from dfd.data import Letterbox
from dfd.data.letterbox import resize_bilinear
from dfd.data.two_sizes import ResizeBy
from dfd.deploy import export, student
from dfd.deploy.inputs import Source
from dfd.deploy.predict import predict
from dfd.deploy.student import Student, load_student
from dfd.engine.run_folder import RunFolder


def image(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def detector(batch):
    found = Instances((9, 9), pred_boxes=Boxes(torch.tensor([[1.0, 2.0, 5.0, 6.0]])))
    found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([0])
    return [{"instances": found} for _ in batch]


def student_of(*augmentations):
    return Student(detector, ["a"], T.AugmentationList(augmentations), "BGR")


@pytest.mark.parametrize(
    "augmentations",
    [
        [Letterbox(96)],
        [T.ResizeShortestEdge(72, 96)],
        [T.ResizeShortestEdge(144, 192), ResizeBy(0.5)],
    ],
    ids=["letterbox", "shortest edge", "under a teacher of larger images"],
)
def test_an_image_of_the_program_s_ratio_is_what_the_evaluation_sees(augmentations):
    own = student_of(*augmentations)
    fixed = own.of_size(72, 96)
    photograph = image(150, 200)
    assert own.pixels(photograph).shape == (3, 72, 96)
    assert torch.equal(fixed.pixels(photograph), own.pixels(photograph))
    assert not fixed.squashes(photograph) and not own.squashes(image(200, 150))
    assert fixed.squashes(image(200, 150)) and not fixed.squashes(image(151, 200))
    assert fixed.pixels(image(200, 150)).shape == (3, 72, 96)


def test_an_image_of_another_ratio_is_resized_in_the_student_s_own_way():
    tall = image(200, 150)
    for own in (Letterbox(96), T.ResizeShortestEdge(72, 96)):
        expected = T.Resize((72, 96)).get_transform(tall).apply_image(tall)
        if isinstance(own, Letterbox):
            expected = resize_bilinear(tall, 72, 96)
        seen = student_of(own).of_size(72, 96).pixels(tall)
        assert np.array_equal(seen.numpy(), expected.transpose(2, 0, 1))


def test_predict_makes_a_program_s_images_in_the_run_s_own_way(monkeypatch):
    class Program:
        metadata = {"classes": ["a"], "image_format": "BGR", "height": 72, "width": 96}

        def __init__(self, path):
            pass

    monkeypatch.setattr(student, "ProgramModel", Program)
    mapper = {"_target_": "detectron2.data.DatasetMapper", "image_format": "BGR"}
    mapper["augmentations"] = [{"_target_": "dfd.data.Letterbox", "size": 96}]
    cfg = OmegaConf.create({"dataloader": {"test": {"mapper": mapper}}})
    run = RunFolder("run", "", cfg, {"results": {"bbox": {}}}, [])
    loaded = load_student(run, exported="x.pt2")
    photograph = image(150, 200)
    expected = student_of(Letterbox(96)).pixels(photograph)
    assert torch.equal(loaded.pixels(photograph), expected)


def test_that_photographs_are_squashed_is_told_once(tmp_path, capsys, monkeypatch):
    own = student_of(Letterbox(96))
    wide, tall = image(150, 200), image(200, 150)
    frames = {"a.png": wide, "b.png": tall, "c.png": tall}
    monkeypatch.setattr(
        "dfd.deploy.predict.read_frames", lambda source, *_: [(source.name, frames[source.name])]
    )
    sources = [Source(tmp_path / name, name) for name in frames]
    for fixed, told in ((own.of_size(72, 96), 1), (own, 0)):
        predict(fixed, sources, tmp_path, pictures=False)
        said = capsys.readouterr().out
        assert said.count("another ratio") == said.count("b.png has another ratio") == told
    monkeypatch.setattr(export, "export_program", lambda *_: b"")
    monkeypatch.setattr(export, "ProgramModel", lambda _: detector)
    export.export(own, [wide, wide, tall], tmp_path / "x.pt2")
    note = "note: 1 of 3 photographs have another ratio than 72 x 96 pixels"
    assert note in capsys.readouterr().out
    export.export(own, [wide, wide], tmp_path / "y.pt2")
    assert "ratio" not in capsys.readouterr().out

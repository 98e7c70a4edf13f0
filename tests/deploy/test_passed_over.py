"""One file or picture that fails leaves the others as they are; what stops everything says so."""

import errno
import io
import json
import os
import shutil
import struct

import cv2
import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from coco_files import write_coco
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from matplotlib.cbook import is_math_text
from omegaconf import OmegaConf
from PIL import Image

from dfd.deploy import draw, inputs
from dfd.deploy.inputs import Source, UnreadableError, find_sources, read_frames
from dfd.deploy.predict import _tell_inside, predict
from dfd.deploy.student import Student
from dfd.engine.console import Interrupted
from dfd.engine.run_folder import RunFolder
from dfd.errors import UserError


def detector(batch):
    (item,) = batch
    if item["image"].shape[-1] > 90:
        raise UserError("the image is wider than 90 pixels")
    found = Instances((item["height"], item["width"]))
    found.pred_boxes = Boxes(torch.tensor([[1.0, 2.0, 5.0, 6.0]]))
    found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([0])
    return [{"instances": found}]


STUDENT = Student(detector, ["a"], T.AugmentationList([T.NoOpTransform()]), "BGR")


def photographs(folder, *names, size=(80, 60)):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path, "PNG")
    return folder


def detect(given, out):
    """What ``predict`` says was passed over and not drawn, and the images of its file."""
    out.mkdir()
    failures = predict(STUDENT, find_sources([str(given)]), out)
    found = json.loads((out / "detections.json").read_text())
    assert len(found["annotations"]) == len(found["images"])
    return failures, [image["file_name"] for image in found["images"]]


def test_what_cannot_be_drawn_keeps_its_detections_and_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "_LONGEST", 85)  # Of a JPEG's 65500.
    long = "n" * 248 + ".png"
    photos = photographs(tmp_path / "photos", "a.png", "a.png.jpg/b.png", long, "z.png")
    photographs(photos, "large.png", size=(86, 4))
    failures, found = detect(photos, tmp_path / "out")
    assert found == ["a.png", "a.png.jpg/b.png", "large.png", long, "z.png"]
    assert failures.passed_over == {} and failures.not_drawn == {
        str(photos / "large.png"): "a side of 86 pixels; a JPEG has at most 85",
        str(photos / long): "File name too long",
        str(photos / "a.png.jpg" / "b.png"): "File exists",
    }
    drawn = sorted(p.name for p in (tmp_path / "out" / "images").iterdir())
    assert drawn == ["a.png.jpg", "z.png.jpg"]


def test_an_image_that_the_student_refuses_is_passed_over(tmp_path):
    photos = photographs(tmp_path / "photos", "a.png", "c.png")
    photographs(photos, "b.png", size=(91, 8))
    failures, found = detect(photos, tmp_path / "out")
    assert found == ["a.png", "c.png"] and failures.not_drawn == {}
    assert failures.passed_over == {str(photos / "b.png"): "the image is wider than 90 pixels"}


def test_a_full_disk_ends_it_and_what_was_found_is_kept(tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def full(number):
        calls.append(number)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    photos = photographs(tmp_path / "photos", "a.png", "b.png", "c.png")
    with pytest.raises(UserError, match="b.png.jpg cannot be written .No space left on device"):
        detect(photos, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out" / "images").iterdir()] == ["a.png.jpg"]
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())["images"]) == 2


@pytest.mark.parametrize("name", ["$x^$", "$\\frac$", "a$b$c", "\\$5$"])
def test_dollars_in_the_name_of_a_class_are_no_formula(name, monkeypatch):
    shown = []
    overlay = draw.Visualizer.draw_text

    def draw_text(self, text, *args, **kwargs):
        shown.append(text)
        return overlay(self, text, *args, **kwargs)

    monkeypatch.setattr(draw.Visualizer, "draw_text", draw_text)
    boxes = draw.Boxes(np.array([[5.0, 5.0, 30.0, 30.0]]), [0], [0.5])
    picture = draw.draw_boxes(np.zeros((60, 80, 3), np.uint8), boxes, [name])
    assert Image.open(io.BytesIO(picture)).size == (400, 300)
    # As matplotlib reads it: an escaped dollar is one.
    assert shown[0].replace("\\$", "$") == f"{name} 0.50" and not is_math_text(shown[0])


def test_no_reader_takes_a_signal_for_an_error_of_the_image(tmp_path, monkeypatch):
    def stopped(*_):
        raise Interrupted("SIGINT")

    photographs(tmp_path, "a.png")
    monkeypatch.setattr(inputs, "read_image", stopped)
    with pytest.raises(Interrupted):
        list(read_frames(Source(tmp_path / "a.png", "a.png"), "BGR", 1))


def test_a_note_on_a_file_whose_name_is_no_text_does_not_lose_it(tmp_path, capsys):
    picture, path = Image.new("RGB", (60, 40)), tmp_path / os.fsdecode(b"caf\xe9.tiff")
    with open(path, "w+b") as f:
        picture.save(f, "TIFF", save_all=True, append_images=[picture])
    ((_, image),) = read_frames(Source(path, path.name), "BGR", 1)
    assert image.shape == (40, 60, 3)
    assert "caf\\udce9.tiff holds several pictures" in capsys.readouterr().out


def write_video(path, code):
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), 5, (64, 48))
    for i in range(3):
        video.write(np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    video.release()
    return path


def frames(path):
    return [image for _, image in read_frames(Source(path, path.name), "BGR", 1)]


@pytest.mark.parametrize("ending", ["jpg", "tif"])
def test_a_portrait_photograph_is_turned_once_as_it_says(tmp_path, ending):
    """Pillow turns a TIFF too, and it would be turned twice."""
    pixels, path = np.zeros((60, 80, 3), np.uint8), tmp_path / f"a.{ending}"
    pixels[:16] = 255
    exif = Image.Exif()
    exif[274] = 6  # A quarter turn clockwise.
    more = {"tiffinfo": {274: 6}} if ending == "tif" else {"exif": exif, "quality": 100}
    Image.fromarray(pixels).save(path, **more)
    (image,) = frames(path)
    assert image.shape == (80, 60, 3)
    assert np.abs(np.rot90(pixels, -1).astype(int) - image).max() < 16


def test_a_portrait_video_is_turned_as_it_says(tmp_path):
    path = write_video(tmp_path / "film.mp4", "mp4v")
    lying = frames(path)
    content = bytearray(path.read_bytes())
    # The matrix in the header of the track: a quarter turn clockwise.
    start = content.find(b"tkhd") + 4 + 4 + 20 + 8 + 8
    turn = (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    content[start : start + 36] = struct.pack(">9i", *turn)
    path.write_bytes(content)
    upright = frames(path)
    assert len(upright) == 3
    for before, after in zip(lying, upright, strict=True):
        assert np.array_equal(after, np.rot90(before, -1))


def test_videos_under_other_names(tmp_path):
    """A folder may be full of .ts files that are programs."""
    film = write_video(tmp_path / "film.avi", "MJPG")
    for name in ("a.wmv", "b.ts", "c.MTS"):
        shutil.copy(film, tmp_path / name)
        assert len(frames(tmp_path / name)) == 3
    names = [source.name for source in find_sources([str(tmp_path)])]
    assert names == ["a.wmv", "c.MTS", "film.avi"]
    (tmp_path / "text.ts").write_text("let x = 1;")
    with pytest.raises(UnreadableError, match="OpenCV cannot open this video"):
        frames(tmp_path / "text.ts")


def test_a_file_of_a_folder_and_of_one_above_it_is_had_once(tmp_path):
    photographs(tmp_path, "1.png", "x/1.png")
    (tmp_path / "x" / "link.png").symlink_to(tmp_path / "1.png")
    names = [s.name for s in find_sources([str(tmp_path), f"{tmp_path}/x/../x"])]
    assert names == ["1.png", "x/1.png", "x/link.png"]


def test_results_among_the_inputs_are_told(tmp_path, capsys):
    for out, told in ((tmp_path / "a" / "out", True), (tmp_path / "b", False)):
        _tell_inside(out, [str(tmp_path / "c.png"), str(tmp_path / "a")])
        assert ("the next dfd predict of that folder" in capsys.readouterr().out) is told


def run_on(name):
    cfg = OmegaConf.create({"dataloader": {"test": {"dataset": name}}})
    return RunFolder("run", "", cfg, {}, [])


@pytest.fixture
def registered(tmp_path):
    """The folder of the five images of a data set that other code registered as "dfd_test_own"."""
    write_coco(tmp_path, "val", 5)
    register_coco_instances("dfd_test_own", {}, str(tmp_path / "val.json"), str(tmp_path / "val"))
    yield tmp_path / "val"
    DatasetCatalog.pop("dfd_test_own")
    MetadataCatalog.pop("dfd_test_own")


def test_test_images_are_found_as_the_evaluation_finds_them(registered):
    for path in registered.iterdir():
        path.rename(path.with_suffix(".PNG"))
    assert len(inputs.photographs(run_on("dfd_test_own"), "BGR", [], 5)) == 5


def test_a_remote_test_image_is_read_by_its_name(registered, monkeypatch):
    """A path of pathlib would shorten its //."""
    name = f"dfd-stored://{registered}/0.png"
    monkeypatch.setattr(inputs, "dataset_dicts", lambda **_: [{"file_name": name}])
    (found,) = inputs.photographs(run_on("dfd_test_own"), "BGR", [], 5)
    assert np.array_equal(found, cv2.imread(f"{registered}/0.png"))


@pytest.mark.parametrize(
    ("count", "unreadable", "chosen"),
    [(2, [], [1, 3]), (3, [], [0, 2, 4]), (4, [], [0, 1, 3, 4]), (2, [3, 0], [1, 2]), (9, [2], 4)],
)
def test_test_images_are_evenly_spaced(registered, count, unreadable, chosen):
    images = [cv2.imread(str(registered / f"{i}.png")) for i in range(5)]
    for i in unreadable:
        (registered / f"{i}.png").write_text("no image")
    found = inputs.photographs(run_on("dfd_test_own"), "BGR", [], count)
    if isinstance(chosen, int):
        assert len(found) == chosen
    else:
        assert [[np.array_equal(a, b) for b in images].index(True) for a in found] == chosen


def test_test_data_that_are_not_registered_are_told_with_both_remedies():
    """A config file's own statement registered them in the training alone."""
    with pytest.raises(UserError, match="'zz_val' is not .*docs/extending.md.*; or name photog"):
        inputs.photographs(run_on("zz_val"), "BGR", [], 5)

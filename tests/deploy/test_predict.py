"""dfd predict: images, folders and videos through the student of a finished run."""

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from coco_files import write_coco
from commands import run as train
from detectron2.config import instantiate
from detectron2.data.detection_utils import read_image
from PIL import Image
from pycocotools.coco import COCO

from dfd.deploy import load_student
from dfd.deploy.predict import main
from dfd.engine.console import Interrupted
from dfd.engine.run_folder import load_runs


@pytest.fixture
def predict(finished, tmp_path, monkeypatch):
    """``dfd predict`` of the finished run; returns what it wrote as json."""
    monkeypatch.setattr("dfd.deploy.predict.stop_on_signals", lambda: None)

    def call(*arguments, out="out"):
        folder = tmp_path / out
        main(["--run", str(finished[0]), "--out", str(folder), *map(str, arguments)])
        return json.loads((folder / "detections.json").read_text(encoding="utf-8"))

    return call


def by_image(found):
    boxes = {image["file_name"]: [] for image in found["images"]}
    names = {image["id"]: image["file_name"] for image in found["images"]}
    for a in found["annotations"]:
        boxes[names[a["image_id"]]].append((a["score"], a["category_id"], *a["bbox"]))
    return {name: sorted(rows, reverse=True) for name, rows in boxes.items()}


def test_it_finds_what_the_run_s_own_evaluation_found(finished, predict, tmp_path):
    folder, images, truth = finished
    found = predict(images, "--score", "0")
    evaluated = json.loads((folder / "inference" / "coco_instances_results.json").read_text())
    assert len(found["annotations"]) == len(evaluated) > 0
    names = {image["id"]: image["file_name"] for image in truth.dataset["images"]}
    expected = {name: [] for name in names.values()}
    for d in evaluated:
        row = (d["score"], d["category_id"], *d["bbox"])
        expected[names[d["image_id"]]].append(row)
    for name, rows in by_image(found).items():
        theirs = sorted(expected[Path(name).name], reverse=True)
        assert len(rows) == len(theirs)
        # Score, class and box of each is that of one of theirs, but for rounding.
        gaps = np.abs(np.array(rows)[:, None] - np.array(theirs)[None]).max(axis=2)
        assert gaps.min(axis=1).max() < 0.02 and gaps.min(axis=0).max() < 0.02
    assert [c["name"] for c in found["categories"]] == [
        c["name"] for c in truth.dataset["categories"]
    ]
    for image in found["images"]:
        with Image.open(tmp_path / "out" / "images" / f"{image['file_name']}.jpg") as drawn:
            # Enlarged by a whole number, or as it is.
            assert drawn.width / image["width"] == drawn.height / image["height"] >= 1
    # The file is COCO's form: its own reader takes it.
    again = COCO()
    again.dataset = found
    again.createIndex()
    assert len(again.getAnnIds()) == len(found["annotations"])


def test_low_scores_are_left_out_and_no_picture_is_drawn_if_so_asked(finished, predict, tmp_path):
    every = predict(finished[1], "--score", "0")
    scores = sorted(a["score"] for a in every["annotations"])
    middle = (scores[len(scores) // 2 - 1] + scores[len(scores) // 2]) / 2
    some = predict(finished[1], "--score", middle, "--no-images", out="some")
    assert sorted(a["score"] for a in some["annotations"]) == [s for s in scores if s >= middle]
    assert len(some["images"]) == len(every["images"])
    assert sorted(p.name for p in (tmp_path / "some").iterdir()) == ["detections.json"]


def test_folders_are_searched_and_bad_files_named_and_passed_over(
    finished, predict, tmp_path, capsys
):
    image = next(p for p in sorted(finished[1].iterdir()) if p.suffix in (".jpg", ".png"))
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    (photos / "a.jpg").write_bytes(image.read_bytes())
    (photos / "sub" / "a.JPG").write_bytes(image.read_bytes())
    (photos / "notes.txt").write_text("no image")
    (photos / "broken.png").write_bytes(b"\x89PNG but no more")
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(photos / "deep.png")
    with pytest.raises(SystemExit) as stop:
        predict(photos)
    assert stop.value.code == 1
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [i["file_name"] for i in found["images"]] == ["a.jpg", "sub/a.JPG"]
    assert (tmp_path / "out" / "images" / "sub" / "a.JPG.jpg").is_file()
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"passed over: {photos / 'broken.png'}: ")
    assert second.startswith(f"passed over: {photos / 'deep.png'}: its one channel has more than 8")


def write_video(path, frames):
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    for i in range(frames):
        video.write(np.full((48, 64, 3), (0, 0, 40 * i), np.uint8))  # BGR: ever more red.
    video.release()


def test_frames_of_a_video_are_named_by_their_number(predict, tmp_path):
    write_video(tmp_path / "film.avi", 5)
    found = predict(tmp_path / "film.avi", "--every", "2")
    assert [i["file_name"] for i in found["images"]] == [
        f"film.avi/{n:06d}" for n in (0, 2, 4)
    ]
    assert {(i["width"], i["height"]) for i in found["images"]} == {(64, 48)}
    with Image.open(tmp_path / "out" / "images" / "film.avi" / "000004.jpg") as drawn:
        red, green, blue = np.asarray(drawn.convert("RGB")).reshape(-1, 3)[0]
    assert red > 120 > 60 > max(green, blue)


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_a_frame_has_the_order_that_the_student_wants(finished, tmp_path, order):
    from dfd.deploy.inputs import Source, read_frames

    write_video(tmp_path / "film.avi", 5)
    source = Source(tmp_path / "film.avi", "film.avi")
    *_, (_, frame) = read_frames(source, order, 1)
    pixel = frame[0, 0] if order == "RGB" else frame[0, 0, ::-1]
    assert pixel[0] > 120 > max(pixel[1:])


def test_a_broken_video_is_passed_over(predict, tmp_path, capsys):
    (tmp_path / "film.mp4").write_bytes(b"no video")
    with pytest.raises(SystemExit) as stop:
        predict(tmp_path / "film.mp4")
    assert stop.value.code == 1
    assert "film.mp4: OpenCV cannot open this video" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jpg"], "nowhere.jpg: no such file or folder"),
        (["x" * 300], "xx: no such file or folder"),
        (["empty"], "empty: there is no image or video in this folder"),
        (["a/1.png", "b/1.png"], "would both be called 1.png"),
        (["a", "--score", "2"], "--score 2.0: it must be from 0 to 1"),
        (["a", "--every", "0"], "--every 0: it must be 1 or more"),
        (["a", "--weights", "model_x.pth"], "model_x.pth"),
        (["a", "--run", "empty"], "has no summary.json: the run has not finished"),
        (["a", "--exported", "x.onnx", "--device", "cuda"], "runs on the CPU: leave out --device"),
        (["a", "--out", "full/kept.txt/out"], "folder full/kept.txt/out cannot be made (Not a dir"),
        (["a", "--out", "y" * 300], "yy: File name too long: choose another"),
        (["a", "--device", "gpu"], "--device gpu: Expected one of cpu, cuda"),
        (["a", "--device", "cuda:99"], "--device cuda:99: "),
        (["a", "--device", "meta"], "--device meta: "),
        (["a", "--out", "full"], "--out full: it exists and is not empty"),
    ],
)
def test_bad_arguments_are_told_in_one_line_and_nothing_is_written(
    finished, predict, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "empty", "full"):
        Path(name).mkdir()
    for name in ("a/1.png", "b/1.png"):
        Image.new("RGB", (8, 8)).save(name)
    Path("full", "kept.txt").write_text("kept")
    with pytest.raises(SystemExit) as stop:
        predict(*arguments)
    assert str(stop.value.code).startswith("error: ") and message in str(stop.value.code)
    assert "\n" not in str(stop.value.code)
    assert not Path("out").exists() and [p.name for p in Path("full").iterdir()] == ["kept.txt"]


def test_one_file_by_two_ways_is_one_image(finished, predict):
    image = sorted(finished[1].glob("*.[jp][pn]g"))[0]
    assert len(predict(finished[1], image, image)["images"]) == 3


@pytest.mark.parametrize("weights", ["model_ema.pth", "model_best.pth"])
def test_other_weights_of_the_run_serve_too(finished, predict, weights, tmp_path, monkeypatch):
    held = []

    def load(run, **settings):
        held.append(load_student(run, **settings))
        return held[-1]

    monkeypatch.setattr("dfd.deploy.predict.load_student", load)
    # The file is told from the run's last weights by numbers of its own.
    copy = shutil.copytree(finished[0], tmp_path / "run")
    path = copy / weights
    saved = torch.load(path, weights_only=True)
    marked = saved["model"] | {"backbone.fpn_output3.bias": torch.arange(8.0)}
    torch.save(saved | {"model": marked}, path)
    found = predict(finished[1], "--run", copy, "--weights", weights, "--score", "0")
    names = [category["name"] for category in found["categories"]]
    assert names == ["disc", "box", "bar"]
    assert torch.equal(held[0].model.backbone.fpn_output3.bias, torch.arange(8.0))


def test_what_was_found_is_kept_when_it_is_interrupted(
    finished, predict, tmp_path, monkeypatch, capsys
):
    calls = []

    def stopped(student, image):
        if len(calls) == 2:
            raise Interrupted("SIGINT")
        calls.append(image)
        return original(student, image)

    from dfd.deploy.student import Student

    original = Student.__call__
    monkeypatch.setattr(Student, "__call__", stopped)
    with pytest.raises(SystemExit) as stop:
        predict(finished[1])
    assert stop.value.code == 130 and "SIGINT" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert len(found["images"]) == 2


def test_from_python(finished):
    (run,) = load_runs({"run": str(finished[0])})
    student = load_student(run)
    instances = student(np.zeros((40, 60, 3), np.uint8))
    assert student.classes == ["disc", "box", "bar"] and not student.model.training
    assert instances.image_size == (40, 60)
    assert instances.pred_boxes.tensor.device == torch.device("cpu")


def test_a_student_that_was_given_another_order_than_its_own_serves_too(tmp_path, caplog):
    """The setting beside the student comes first, in training and afterwards."""
    data = {s: write_coco(tmp_path, s, 2, seed=i) for i, s in enumerate(("train", "test"))}
    settings = [
        *(f"dataloader.{split}.{o}" for split, opts in data.items() for o in opts),
        "dataloader.train.mapper.image_format=RGB",
        "model.input_format=RGB",
        "model.student.pixel_mean=[123.7,116.3,103.5]",
        "model.teacher.allow_random=true",
        "train.max_iter=1",
        f"train.output_dir={tmp_path / 'run'}",
    ]
    train("tests/engine/configs/dfd.py", *settings)
    (run,) = load_runs({"run": str(tmp_path / "run")})
    assert load_student(run, device="cpu").image_format == "RGB"
    weights = f"train.init_checkpoint={tmp_path / 'run' / 'model_final.pth'}"
    caplog.clear()
    train("tests/engine/configs/dfd.py", "--eval-only", *settings, weights)
    assert "copypaste: " in caplog.text


def test_names_and_shapes_that_images_rarely_have(predict, tmp_path, capsys):
    photos = tmp_path / "photos"
    (photos / ".ipynb_checkpoints").mkdir(parents=True)
    picture = Image.new("RGB", (60, 40))
    for name in (b"caf\xe9.png", b"z.png", b".ipynb_checkpoints/a-checkpoint.png"):
        with open(os.path.join(os.fsencode(photos), name), "wb") as f:
            picture.save(f, "PNG")
    Image.new("RGB", (3000, 1)).save(photos / "thin.png")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    picture.save(elsewhere / "stack.tiff", save_all=True, append_images=[picture, picture])
    (photos / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(photos)
    with pytest.raises(SystemExit):
        predict(photos)
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    names = [os.fsencode(image["file_name"]) for image in found["images"]]
    assert names == [b"caf\xe9.png", b"link/stack.tiff", b"z.png"]
    told = capsys.readouterr()
    assert "link/stack.tiff holds several pictures: the first is read" in told.out
    (line,) = told.err.splitlines()
    assert "thin.png: an image of 1 x 3000 pixels cannot be made what the network sees" in line


def test_a_video_that_ends_before_its_length_is_named_and_what_was_found_kept(
    predict, tmp_path, capsys
):
    write_video(tmp_path / "whole.avi", 60)
    content = (tmp_path / "whole.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: len(content) // 3])
    with pytest.raises(SystemExit) as stop:
        predict(tmp_path / "cut.avi", "--no-images")
    assert stop.value.code == 1
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    frames = len(found["images"])
    assert 0 < frames < 30
    assert f"OpenCV reads {frames} of its 60 frames; what was found on these is kept" in (
        capsys.readouterr().err
    )


def test_a_student_under_a_teacher_of_larger_images_gets_its_own_size(tmp_path):
    """The mapper's augmentations make the teacher's image there."""
    data = {s: write_coco(tmp_path, s, 2, seed=i) for i, s in enumerate(("train", "test"))}
    train(
        "tests/engine/configs/vit.py",
        *(f"dataloader.{split}.{o}" for split, opts in data.items() for o in opts),
        "train.max_iter=1",
        "train.eval_period=0",
        "train.disparity_images.period=0",
        "model.teacher.allow_random=true",
        # As configs of two sizes have it.
        "model.teacher.scale={_target_: dfd.data.size_ratio, teacher: 128, student: 64}",
        f"train.output_dir={tmp_path / 'run'}",
    )
    (run,) = load_runs({"run": str(tmp_path / "run")})
    student = load_student(run, device="cpu")
    item = instantiate(run.cfg.dataloader.test).dataset[0]
    image = read_image(item["file_name"], student.image_format)
    assert item["teacher_image"].shape[-1] == 2 * item["image"].shape[-1]
    assert torch.equal(student.pixels(image), item["image"])
    assert json.dumps(student.described[-1]["scale"]) == "0.5"  # As an exported file tells it.

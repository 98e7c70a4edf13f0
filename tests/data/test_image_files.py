"""Images that annotations name in another spelling than the disk's: found and told, or refused."""

import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from dfd.data import coco_json, dataset_dicts, dataset_report
from dfd.errors import UserError

NAME = "dfd_test_image_files"
NFC, NFD = (unicodedata.normalize(form, "Gärten/käse.jpg") for form in ("NFC", "NFD"))
SPELLING = "images found under another spelling of their name"
FOLDER = "images found without the folders that their name begins with"


@pytest.fixture
def write(tmp_path, forget):
    """Writes images into a folder ``photos`` and a json of names, and registers them."""

    def write(on_disk, listed, reader="coco_json", folder="photos"):
        root = tmp_path / folder
        for file in on_disk:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(root / file, "JPEG")
        images = [{"id": i, "file_name": n, "width": 40, "height": 30}
                  for i, n in enumerate(listed, start=1)]  # fmt: skip
        annotations = [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 2, 10, 8],
                        "area": 80, "iscrowd": 0} for i in range(1, len(listed) + 1)]  # fmt: skip
        categories = [{"id": 1, "name": "thing"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        path = tmp_path / "data.json"
        path.write_text(json.dumps({"info": {}, **content}))
        if reader == "coco_json":
            return coco_json(json=str(path), images=str(root))
        if reader == "register_coco_instances":
            register_coco_instances(NAME, {}, str(path), str(root))
        else:
            record = {"height": 30, "width": 40, "annotations": []}
            join = Path if reader == "paths" else str
            records = [{**record, "image_id": i, "file_name": join(f"{root}/{name}")}
                       for i, name in enumerate(listed, start=1)]  # fmt: skip
            DatasetCatalog.register(NAME, lambda: records)
            MetadataCatalog.get(NAME).thing_classes = ["thing"]
        return NAME

    return write


def found(name, root):
    records = dataset_dicts(dataset=name, filter_empty=False)
    return [Path(r["file_name"]).relative_to(root).as_posix() for r in records]


SPELT = [
    ("sub/a.jpg", r"sub\a.jpg"),
    ("my image.jpg", "my%20image.jpg"),
    ("my%20image.jpg", "my image.jpg"),
    ("sub/my image.jpg", "sub%2Fmy%20image.jpg"),
    ("sub/a b.jpg", r"sub%5Ca%20b.jpg"),
    (NFC, NFD),
    (NFD, NFC),
    ("a.JPG", "a.jpg"),
    ("IMG_1.jpg", "img_1.JPG"),
    ("Sub/a.jpg", "sub/a.jpg"),
    ("a.jpg", "a.jpg\n"),
]


@pytest.mark.parametrize("reader", ["coco_json", "register_coco_instances", "records"])
@pytest.mark.parametrize("on_disk, listed", SPELT)
def test_another_spelling_is_found_and_counted(write, tmp_path, reader, on_disk, listed):
    name = write([on_disk, "other.jpg"], [listed, "other.jpg"], reader)
    assert found(name, tmp_path / "photos") == [on_disk, "other.jpg"]
    report = dataset_report(name)
    assert report.dropped == {SPELLING: 1} and on_disk in report.examples[SPELLING]


@pytest.mark.parametrize(
    "listed",
    [
        "photos/a.jpg",
        r"photos\a.jpg",
        "./photos/a.jpg",
        "{parent}/photos/a.jpg",
        r"C:\data\photos\a.jpg",
        "d:/data/photos/a.jpg",
        r"\\server\share\photos\a.jpg",
        "/home/someone/photos/a.jpg",
        "http://images.example.org/photos/a.jpg",
        "https://example.org/x/photos/a.jpg?size=full",
        "file:///home/someone/photos/a.jpg",
        "/a.jpg",
    ],
)
@pytest.mark.parametrize("reader", ["coco_json", "register_coco_instances"])
def test_folders_before_the_images_folder_are_left_out(write, tmp_path, reader, listed):
    name = write(["a.jpg"], [listed.format(parent=tmp_path.name)], reader)
    assert found(name, tmp_path / "photos") == ["a.jpg"]
    assert dataset_report(name).dropped == {FOLDER: 1}


@pytest.mark.parametrize(
    "on_disk, listed",
    [
        ("a.jpg", "b.jpg"),
        ("a.jpg", "a.png"),
        ("a.jpg", "val/a.jpg"),
        ("a.jpg", "val/photos/a.jpg"),
        ("a.jpg", r"C:\data\pictures\a.jpg"),
        ("a.jpg", "https://example.org/a.jpg"),
        ("sub/a.jpg", "a.jpg"),
        ("sub/a.jpg", "other/a.jpg"),
        ("a.jpg/b.jpg", "a.jpg"),
        ("a.jpg", "a.jpg\0"),
        ("a.jpg", "b\nc.jpg"),
        ("a.jpg", "x" * 5000),
    ],
)
@pytest.mark.parametrize("reader", ["coco_json", "register_coco_instances"])
def test_no_other_image_is_taken(write, reader, on_disk, listed):
    with pytest.raises(UserError, match=r"1 of 1 images .* are missing on disk") as e:
        dataset_dicts(dataset=write([on_disk], [listed], reader))
    assert "\n" not in str(e.value)


def test_image_of_another_split_is_not_taken(write):
    with pytest.raises(UserError, match="missing on disk"):
        write(["a.jpg"], [r"C:\data\val\images\a.jpg"], folder="train/images")
    assert write(["a.jpg"], [r"C:\data\train\images\a.jpg"], folder="train/images")


@pytest.mark.parametrize(
    "on_disk, listed, message",
    [
        (["A.jpg", "a.JPG"], ["a.jpg"], r"may be .*A\.jpg or .*a\.JPG"),
        (["a.jpg"], ["a.jpg", "A.jpg"], r"photos/A\.jpg and .*photos/a\.jpg would both be"),
        (["a.jpg"], ["photos/a.jpg", "a.jpg"], "would both be"),
        (["a.jpg"], ["a.JPG", "A.jpg"], "would both be"),
        (["x y.jpg", "x%20y.jpg"], ["X y.jpg"], "may be"),
    ],
)
@pytest.mark.parametrize("reader", ["coco_json", "register_coco_instances"])
def test_name_of_two_files_or_file_of_two_names_is_refused(write, reader, on_disk, listed, message):
    with pytest.raises(UserError, match=message) as e:
        dataset_dicts(dataset=write(on_disk, listed, reader))
    assert "\n" not in str(e.value)


def test_exact_name_wins_and_nothing_is_told(write, tmp_path):
    files = ["a.jpg", "A.jpg", "photos/a.jpg", "x%20y.jpg", "x y.jpg", r"s\a.jpg", "s/a.jpg"]
    name = write(files, files)
    assert found(name, tmp_path / "photos") == files
    assert dataset_report(name).dropped == {}


def test_paths_are_looked_up_like_strings(write, tmp_path):
    name = write(["a.jpg", "b.JPG"], ["a.jpg", "b.jpg"], "paths")
    assert found(name, tmp_path / "photos") == ["a.jpg", "b.JPG"]


def test_relative_names_without_a_folder_of_images(forget, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "photos/a.jpg")
    monkeypatch.chdir(tmp_path)
    record = {"file_name": r"photos\a.jpg", "image_id": 1, "width": 40, "height": 30}
    DatasetCatalog.register(NAME, lambda: [record])
    MetadataCatalog.get(NAME).thing_classes = ["thing"]
    (read,) = dataset_dicts(dataset=NAME, filter_empty=False)
    assert read["file_name"] == "photos/a.jpg" and record["file_name"] == r"photos\a.jpg"


def test_link_to_an_image_is_one_and_a_link_to_nothing_is_missing(write, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/b.jpg").symlink_to(tmp_path / "photos/a.jpg")
    (tmp_path / "photos/self.jpg").symlink_to(tmp_path / "photos/self.jpg")
    assert found(write(["a.jpg"], ["b.jpg"]), tmp_path / "photos") == ["b.jpg"]
    (tmp_path / "photos/a.jpg").unlink()
    with pytest.raises(UserError, match=r"missing on disk, e\.g\. .*b\.jpg"):
        dataset_dicts(dataset=write([], ["b.jpg"], "records"))


def test_one_listing_per_folder_and_no_header_is_read(write, monkeypatch):
    listed, opened = [], []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(path))
    files = [f"{sub}/{i}.jpg" for sub in "ab" for i in range(20)]
    name = write(files, files)
    monkeypatch.setattr(Image, "open", lambda *_: opened.append(1))
    dataset_dicts(dataset=name)
    assert sorted(os.path.basename(p) for p in listed if "photos" in str(p)) == ["a", "b"]
    assert not opened


@pytest.mark.parametrize("policy", ["error", "drop"])
def test_folder_that_may_not_be_listed_is_named_and_nothing_is_dropped(
    write, tmp_path, monkeypatch, policy
):
    write(["a.jpg"], ["a.jpg"], "records")
    scandir = os.scandir

    def closed(path):
        if os.path.basename(path) == "photos":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=r"photos/a\.jpg may not be listed: make it readable"):
        coco_json(
            json=str(tmp_path / "data.json"),
            images=str(tmp_path / "photos"),
            missing_images=policy,
        )

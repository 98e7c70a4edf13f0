"""Reading folders laid out like Pascal VOC."""

import cv2
import numpy as np
import pytest
from detectron2.data import MetadataCatalog

from dfd.data import class_names, dataset_dicts, voc_folder
from dfd.errors import UserError


def xml(objects, width=40, height=30):
    items = "".join(
        f"<object><name>{name}</name><difficult>{int(difficult)}</difficult><bndbox>"
        f"<xmin>{b[0]}</xmin><ymin>{b[1]}</ymin><xmax>{b[2]}</xmax><ymax>{b[3]}</ymax>"
        "</bndbox></object>"
        for name, b, difficult in objects
    )
    size = f"<size><width>{width}</width><height>{height}</height></size>"
    return f"<annotation>{size}{items}</annotation>"


@pytest.fixture
def root(tmp_path):
    """Three 40x30 images, a and b in train, c in val; class "zebra" occurs in val only."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    objects = {
        "a": [("cat", (1, 1, 40, 30), False), ("ant", (5, 6, 14, 15), True)],
        "b": [("cat", (8, 8, 8, 8), False)],
        "c": [("zebra", (2, 2, 9, 9), False)],
    }
    for stem, items in objects.items():
        (tmp_path / f"Annotations/{stem}.xml").write_text(xml(items))
        cv2.imwrite(str(tmp_path / f"JPEGImages/{stem}.jpg"), np.zeros((30, 40, 3), np.uint8))
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\nb  1\n\n")
    (tmp_path / "ImageSets/Main/val.txt").write_text("c\n")
    return tmp_path


def test_boxes_are_one_based_inclusive_pixels(root):
    records = dataset_dicts(dataset=voc_folder(root=str(root), split="train"))
    assert [a["bbox"] for a in records[0]["annotations"]] == [[0, 0, 40, 30], [4, 5, 14, 15]]


def test_every_split_gets_the_classes_of_the_whole_folder(root):
    names = [voc_folder(root=str(root), split=s) for s in ("train", "val")]
    assert [class_names(n) for n in names] == [["ant", "cat", "zebra"]] * 2
    assert dataset_dicts(dataset=names[1])[0]["annotations"][0]["category_id"] == 2
    chosen = voc_folder(root=str(root), split="train", classes=["cat", "ant"])
    assert class_names(chosen) == ["cat", "ant"] and chosen not in names


def test_box_of_one_point_is_dropped_counted_and_leaves_an_image_without_objects(root):
    name = voc_folder(root=str(root), split="train")
    report = MetadataCatalog.get(name).dfd_report
    assert report.dropped == {"boxes dropped, without area": 1}
    assert "b.xml" in report.examples["boxes dropped, without area"]
    assert (report.images, report.images_without_objects, report.difficult) == (2, 1, 1)
    assert len(dataset_dicts(dataset=name)) == 1
    assert len(dataset_dicts(dataset=name, filter_empty=False)) == 2


def test_class_that_is_not_listed_is_fatal_unless_dropped(root):
    with pytest.raises(UserError, match=r"1 objects .*classes=\['cat'\].*'ant'"):
        voc_folder(root=str(root), split="train", classes=["cat"])
    name = voc_folder(root=str(root), split="train", classes=["cat"], unknown_classes="drop")
    report = MetadataCatalog.get(name).dfd_report
    assert report.dropped["annotations dropped, unknown class"] == 1
    assert report.instances == {"cat": 1}


def test_image_with_another_extension_or_without_size_in_the_xml_is_read(root):
    (root / "JPEGImages/c.jpg").unlink()
    cv2.imwrite(str(root / "JPEGImages/c.png"), np.zeros((25, 35, 3), np.uint8))
    (root / "Annotations/c.xml").write_text(xml([("zebra", (2, 2, 9, 9), False)], 0, 0))
    record = dataset_dicts(dataset=voc_folder(root=str(root), split="val"))[0]
    assert (record["width"], record["height"]) == (35, 25)
    assert record["file_name"].endswith("c.png")


def test_missing_image_is_fatal_unless_dropped(root):
    (root / "JPEGImages/b.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 2 images .*b\.jpg"):
        voc_folder(root=str(root), split="train")
    name = voc_folder(root=str(root), split="train", missing_images="drop")
    assert [r["image_id"] for r in dataset_dicts(dataset=name, filter_empty=False)] == [1]


def test_what_is_missing_or_broken_is_named_in_one_line(root):
    cases = [
        (dict(root="", split="train"), "root is empty: set dataloader.train.dataset.root"),
        (dict(root=str(root / "none"), split="train"), "none/ImageSets/Main does not exist"),
        (dict(root=str(root), split="tset"), "split 'tset' does not exist .*train, twice, val"),
        (dict(root=str(root), split="twice"), "image a is listed 2 times"),
        (dict(root=str(root), split="more", classes=["cat"]), "d.xml does not exist"),
        (dict(root=str(root), split="torn", classes=["cat"]), "e.xml is not valid XML"),
        (dict(root=str(root), split="none"), "holds no images"),
    ]
    (root / "ImageSets/Main/twice.txt").write_text("a\na\n")
    (root / "ImageSets/Main/more.txt").write_text("d\n")
    (root / "ImageSets/Main/torn.txt").write_text("e\n")
    (root / "ImageSets/Main/none.txt").write_text("")
    for arguments, message in cases:
        if arguments["split"] == "torn":
            (root / "Annotations/e.xml").write_text("<annotation><obj")
        with pytest.raises(UserError, match=message) as e:
            voc_folder(**arguments)
        assert "\n" not in str(e.value)
        (root / "Annotations/e.xml").unlink(missing_ok=True)

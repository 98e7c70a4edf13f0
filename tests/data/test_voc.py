"""Reading folders laid out like Pascal VOC."""

import os

import cv2
import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from PIL import Image

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


def test_split_that_is_called_a_number(root):
    (root / "ImageSets/Main/2007.txt").write_text("a\n")
    assert len(dataset_dicts(dataset=voc_folder(root=str(root), split=2007))) == 1


def test_whole_size_with_a_point(root):
    (root / "Annotations/a.xml").write_text(xml([("cat", (1, 1, 9, 9), False)], "40.0", " 30 "))
    record = dataset_dicts(dataset=voc_folder(root=str(root), split="train"))[0]
    assert (record["width"], record["height"]) == (40, 30)


@pytest.mark.parametrize("content", ["<html><body>not found</body></html>", "<data/>"])
def test_xml_of_something_else_is_no_image_without_objects(root, content):
    (root / "Annotations/a.xml").write_text(content)
    with pytest.raises(UserError, match=r"a\.xml is no annotation: its root is <(html|data)>"):
        voc_folder(root=str(root), split="train")
    (root / "Annotations/a.xml").write_text("<annotation/>")
    name = voc_folder(root=str(root), split="train")
    assert len(dataset_dicts(dataset=name, filter_empty=False)) == 2


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


def write_voc(root, annotations, images, **splits):
    """A folder of one 40x30 image per name and one box per xml: its x0 tells which xml it was."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(annotations, start=1):
        path = root / f"Annotations/{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(xml([("cat", (i, 1, 40, 30), False)]))
    for name in images:
        path = root / f"JPEGImages/{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(path, "PNG")
    for split, text in splits.items():
        (root / f"ImageSets/Main/{split}.txt").write_bytes(
            text if isinstance(text, bytes) else text.encode()
        )
    return {"root": str(root), "split": "train"}


def read(**arguments):
    """The image of each record, and the number of the xml file that its box came from."""
    records = dataset_dicts(dataset=voc_folder(**arguments), filter_empty=False)
    start = len(os.path.join(arguments["root"], "JPEGImages", ""))
    return [(r["file_name"][start:], int(r["annotations"][0]["bbox"][0]) + 1) for r in records]


LISTS = {
    "blanks": (["img.xml", "img 2.xml"], ["img.jpg", "img 2.jpg"], "img 2\n", [("img 2.jpg", 2)]),
    "blank and number like a flag": (
        ["img.xml", "img 1.xml", "pic 1.xml"],
        ["img.jpg", "img 1.jpg", "pic 1.jpg"],
        "img 1\npic 1\n",
        [("img 1.jpg", 2), ("pic 1.jpg", 3)],
    ),
    "flags": (
        ["a.xml", "b.xml", "c.xml"],
        ["a.jpg", "b.jpg", "c.jpg"],
        "a -1\nb  1\nc  0\n",
        [("a.jpg", 1), ("b.jpg", 2), ("c.jpg", 3)],
    ),
    "flags after blanks": (
        ["my a.xml", "my.xml"], ["my a.jpg", "my.jpg"], "my a -1\n", [("my a.jpg", 1)],
    ),
    "flags, and a name that ends like one": (
        ["a.xml", "a 1.xml", "b.xml"],
        ["a.jpg", "a 1.jpg", "b.jpg"],
        "a  1\nb -1\n",
        [("a.jpg", 1), ("b.jpg", 3)],
    ),
    "extensions": (["a.xml", "b.xml"], ["a.jpg", "b.PNG"], "a.jpg\nb.png 1\n",
                   [("a.jpg", 1), ("b.PNG", 2)]),
    "xml named": (["a.xml"], ["a.jpg"], "Annotations/a.xml\n", [("a.jpg", 1)]),
    "dots": (["a.xml", "a.b.xml", "v1.2.xml"], ["a.jpg", "a.b.jpg", "v1.2.png"],
             "a.b\nv1.2.png\n", [("a.b.jpg", 2), ("v1.2.png", 3)]),
    "extension in the name of the xml": (["a.jpg.xml"], ["a.jpg"], "a.jpg\n", [("a.jpg", 1)]),
    "windows": (["a.xml", "s/b.xml"], ["a.jpg", "s/b.jpg"], "a\r\n\r\ns\\b\r\n",
                [("a.jpg", 1), ("s/b.jpg", 2)]),
    "comments and empty lines": (["a.xml", "#1.xml"], ["a.jpg", "#1.jpg"],
                                 "# images of day 1\n\n  a \n#1\n", [("a.jpg", 1), ("#1.jpg", 2)]),
    "byte-order mark": (["a.xml"], ["a.jpg"], b"\xef\xbb\xbfa\n", [("a.jpg", 1)]),
    "utf-16": (["ä.xml", "b.xml"], ["ä.jpg", "b.jpg"], "ä\r\nb\r\n".encode("utf-16"),
               [("ä.jpg", 1), ("b.jpg", 2)]),
    "utf-16 without a mark": (["a.xml"], ["a.jpg"], "a\r\n".encode("utf-16-le"), [("a.jpg", 1)]),
    "decomposed letters": (["a\u0308.xml"], ["a\u0308.jpg"], "\u00e4\n", [("a\u0308.jpg", 1)]),
    "images in subfolders": (["a.xml", "b.xml"], ["x/a.jpg", "y/b.jpg"], "a\nb\n",
                             [("x/a.jpg", 1), ("y/b.jpg", 2)]),
    "both in subfolders": (["x/a.xml", "y/a.xml"], ["x/a.jpg", "y/a.jpg"], "y/a\nx/a\n",
                           [("y/a.jpg", 2), ("x/a.jpg", 1)]),
    "xml in subfolders": (["x/a.xml"], ["a.jpg"], "a\n", [("a.jpg", 1)]),
    "macOS": (["a.xml", "._a.xml"], ["a.jpg", "._a.jpg"], "a\n", [("a.jpg", 1)]),
}  # fmt: skip


@pytest.mark.parametrize("annotations, images, text, expected", LISTS.values(), ids=LISTS)
def test_what_a_list_names(tmp_path, annotations, images, text, expected):
    given = write_voc(tmp_path, annotations, images, train=text, other="nothing\n")
    (tmp_path / "ImageSets/Main/._train.txt").write_bytes(b"\0\5\x16\7")
    for hidden in (tmp_path / "Annotations").glob("._*"):
        hidden.write_bytes(b"\0\5\x16\7")
    assert read(**given) == expected


REFUSED = {
    "name or flag": (["a.xml", "a 1.xml"], ["a.jpg", "a 1.jpg"], "a 1\n",
                     "'a 1' may be image 'a 1', or image 'a' and a flag"),
    "name with blanks that is not there": (["a.xml"], ["a.jpg"], "a 2\n", r"a 2\.xml does not"),
    "two subfolders": (["a.xml"], ["x/a.jpg", "y/a.jpg"], "a\n",
                       r"image a may be .*x/a\.jpg or .*y/a\.jpg"),
    "two xml": (["x/a.xml", "y/a.xml"], ["a.jpg"], "a\n", r"x/a\.xml or .*y/a\.xml"),
    "one image for two xml": (["a.xml", "x/a.xml"], ["x/a.jpg"], "a\n", "missing on disk"),
    "image of another subfolder": (["x/a.xml"], ["y/a.jpg"], "x/a\n", "missing on disk"),
    "image of another capital": (["A.xml", "a.xml"], ["a.jpg"], "A\n", "missing on disk"),
    "twice, once with an extension": (["a.xml"], ["a.jpg"], "a\na.jpg\n", "a is listed 2 times"),
    "two images": (["a.xml"], ["a.jpg", "a.png"], "a\n", r"may be .*a\.jpg or .*a\.png: name it"),
    "no text": (["a.xml"], ["a.jpg"], b"\xff\xd8\xc3\x28", "train.txt is not text in utf-8"),
}  # fmt: skip


@pytest.mark.parametrize("annotations, images, text, message", REFUSED.values(), ids=REFUSED)
def test_list_that_may_name_another_image_is_refused(tmp_path, annotations, images, text, message):
    given = write_voc(tmp_path, annotations, images, train=text)
    with pytest.raises(UserError, match=message) as e:
        voc_folder(**given)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("other", ["a.txt", "a.xml", "a.json", "a.npy", "a.jpg.bak", "a.png"])
@pytest.mark.parametrize("named", ["a.jpg", r"C:\images\a.JPG"])
def test_other_files_of_the_name_are_not_taken_for_the_image(tmp_path, other, named):
    given = write_voc(tmp_path, ["a.xml"], ["a.jpg", other], train="a\n")
    path = tmp_path / "Annotations/a.xml"
    path.write_text(path.read_text().replace("<size>", f"<filename>{named}</filename><size>"))
    assert read(**given) == [("a.jpg", 1)]
    (tmp_path / "JPEGImages/a.jpg").unlink()
    if other != "a.png":
        with pytest.raises(UserError, match=r"missing on disk, e\.g\. .*a\.jpg"):
            voc_folder(**given, subset_seed=1)


def test_links_to_images_folders_and_in_a_circle(tmp_path):
    given = write_voc(tmp_path, ["a.xml", "b.xml"], ["a.jpg"], train="a\nb\n")
    (tmp_path / "JPEGImages/circle").symlink_to(tmp_path / "JPEGImages")
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "elsewhere/c.jpg")
    (tmp_path / "JPEGImages/b.jpg").symlink_to(tmp_path / "elsewhere/c.jpg")
    assert read(**given) == [("a.jpg", 1), ("b.jpg", 2)]


def test_old_copies_in_a_subfolder_add_no_class(tmp_path):
    given = write_voc(tmp_path, ["a.xml", "old/a.xml", "old/b.xml"], ["a.jpg"], train="a\n")
    (tmp_path / "Annotations/old/b.xml").write_text(xml([("dog", (1, 1, 9, 9), False)]))
    assert class_names(voc_folder(**given)) == ["cat"] and read(**given) == [("a.jpg", 1)]
    given = write_voc(tmp_path / "more", ["x/a.xml"], ["x/a.jpg"], train="x/a\n")
    assert class_names(voc_folder(**given)) == ["cat"]


def test_missing_image_is_dropped_though_its_xml_has_no_size(tmp_path):
    given = write_voc(tmp_path, ["a.xml", "b.xml"], ["a.jpg"], train="a\nb\n")
    (tmp_path / "Annotations/b.xml").write_text(xml([("cat", (1, 1, 9, 9), False)], 0, 0))
    assert read(**given, missing_images="drop") == [("a.jpg", 1)]
    with pytest.raises(UserError, match=r"missing on disk, e\.g\. .*b\.jpg"):
        voc_folder(**given)


def test_damaged_image_that_is_asked_for_its_size_is_named(tmp_path):
    given = write_voc(tmp_path, ["a.xml"], ["a.jpg"], train="a\n")
    (tmp_path / "Annotations/a.xml").write_text(xml([("cat", (1, 1, 9, 9), False)], 0, 0))
    (tmp_path / "JPEGImages/a.jpg").write_text("<html>")
    with pytest.raises(UserError, match=r"cannot load image .*a\.jpg \(cannot identify"):
        voc_folder(**given)


def test_another_spelling_of_an_image_is_counted(tmp_path):
    given = write_voc(tmp_path, ["a.xml", "B.xml"], ["A.jpg", "b.jpg"], train="a\nb\n")
    assert read(**given) == [("A.jpg", 1), ("b.jpg", 2)]
    report = MetadataCatalog.get(voc_folder(**given)).dfd_report
    assert report.dropped == {"images found under another spelling of their name": 3}

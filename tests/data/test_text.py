"""Annotation files in the encodings in which tools save them."""

import codecs
import json
import logging

import pytest
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from dfd.data import (
    build_evaluator,
    class_names,
    coco_json,
    dataset_dicts,
    dataset_report,
    voc_folder,
)
from dfd.errors import UserError

NAME = "dfd_test_text"
ENCODINGS = {
    "utf-8-sig": lambda t: t.encode("utf-8-sig"),
    "utf-16": lambda t: codecs.BOM_UTF16_LE + t.encode("utf-16-le"),
    "utf-16 big": lambda t: codecs.BOM_UTF16_BE + t.encode("utf-16-be"),
    "utf-16-le": lambda t: t.encode("utf-16-le"),
    "utf-16-be": lambda t: t.encode("utf-16-be"),
    "utf-32": lambda t: codecs.BOM_UTF32_LE + t.encode("utf-32-le"),
    "utf-32-le": lambda t: t.encode("utf-32-le"),
    "utf-32-be": lambda t: t.encode("utf-32-be"),
}


def write_json(folder, encode):
    Image.new("RGB", (40, 30)).save(folder / "a.png")
    content = {
        "info": {},
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 8],
                         "area": 80, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "Käse 猫"}],
    }  # fmt: skip
    (folder / "data.json").write_bytes(encode(json.dumps(content, ensure_ascii=False)))
    return {"json": str(folder / "data.json"), "images": str(folder)}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_is_read_told_and_evaluated(tmp_path, encoding):
    paths = write_json(tmp_path, ENCODINGS[encoding])
    name = coco_json(**paths)
    assert class_names(name) == ["Käse 猫"] and len(dataset_dicts(dataset=name)) == 1
    (kind,) = dataset_report(name).dropped
    assert kind == f"json files decoded from {encoding.removesuffix(' big')}"
    assert len(build_evaluator(dataset=name)._coco_api.anns) == 1


def test_plain_json_is_evaluated_as_it_is(tmp_path):
    paths = write_json(tmp_path, lambda t: t.encode())
    report = dataset_report(coco_json(**paths))
    assert report.dropped == {} and report.ground_truth == paths["json"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("classes", [{}, {"thing_classes": ["Käse 猫"]}])
def test_json_that_detectron2_itself_could_not_read(tmp_path, forget, encoding, classes):
    paths = write_json(tmp_path, ENCODINGS[encoding])
    register_coco_instances(NAME, classes, paths["json"], paths["images"])
    assert len(dataset_dicts(dataset=NAME)) == 1 and class_names(NAME) == ["Käse 猫"]
    report = dataset_report(NAME)
    assert any(kind.startswith("json files decoded from utf-") for kind in report.dropped)
    assert len(build_evaluator(dataset=NAME)._coco_api.anns) == 1


@pytest.mark.parametrize(
    "data, message",
    [
        (b'{"images": "\xc4\xa7\xb5\xc4"}', "is not text in utf-8"),
        (b"\xff\xfe{\0}", "is not text in utf-16"),
        (b"[" * 200_000, "nested too deep"),
        (b"", "is not JSON"),
        (b"\xef\xbb\xbf", "is not JSON"),
        (b"\0", "is not JSON"),
    ],
)
def test_json_that_is_none_is_one_line(tmp_path, data, message):
    (tmp_path / "data.json").write_bytes(data)
    with pytest.raises(UserError, match=message) as e:
        coco_json(json=str(tmp_path / "data.json"), images=str(tmp_path))
    assert "data.json" in str(e.value) and "\n" not in str(e.value)


def write_voc(root, data):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(root / "JPEGImages/a.jpg")
    (root / "Annotations/a.xml").write_bytes(data)
    (root / "ImageSets/Main/train.txt").write_text("a\n")
    return {"root": str(root), "split": "train"}


def text(declaration, name, tag="annotation"):
    return (
        f"{declaration}<{tag}><!-- a comment --><size><width>40</width><height>30</height></size>"
        f"<object><name>{name}</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>11</xmax>"
        f"<ymax>12</ymax></bndbox></object></annotation>"
    )


def declared(encoding):
    return f'<?xml version="1.0" encoding="{encoding}"?>\n'


XML = {
    # Encoding of the bytes, what is declared, a name, and whether a notice is due.
    "none": ("utf-8", "", "猫", False),
    "utf-8": ("utf-8", declared("utf-8"), "猫", False),
    "byte-order mark": ("utf-8-sig", declared("utf-8"), "猫", False),
    "byte-order mark beside another encoding": ("utf-8-sig", declared("gbk"), "猫", False),
    "utf-16": ("utf-16", declared("utf-16"), "猫", False),
    "utf-16 without a declaration": ("utf-16", "", "猫", False),
    "utf-16 without a mark": ("utf-16-le", declared("utf-16"), "猫", False),
    "gbk": ("gbk", declared("GBK"), "猫", False),
    "gb2312": ("gb2312", declared("gb2312"), "猫", False),
    "gb2312 with letters of gbk": ("gbk", declared("GB2312"), "貓", False),
    "gb18030": ("gb18030", declared("gb18030"), "㐀", False),
    "big5": ("big5", declared("Big5"), "貓", False),
    "shift_jis": ("shift_jis", declared("Shift_JIS"), "ねこ", False),
    "shift_jis with letters of Windows": ("cp932", declared("Shift-JIS"), "①髙", False),
    "euc-jp": ("euc-jp", declared("EUC-JP"), "ねこ", False),
    "euc-kr": ("euc-kr", declared("euc-kr"), "고양이", False),
    "latin-1": ("latin-1", declared("ISO-8859-1"), "Käse", False),
    "windows-1252": ("cp1252", declared("windows-1252"), "Käse", False),
    "single quotes": ("gbk", "<?xml version='1.0' encoding='gbk' ?>", "猫", False),
    "blank lines before": ("gbk", "\n  " + declared("gbk"), "猫", False),
    "unknown": ("utf-8", declared("my-charset"), "猫", True),
    "no text encoding": ("utf-8", declared("hex"), "猫", True),
    "utf-16 declared for bytes": ("utf-8", declared("utf-16"), "猫", True),
    "ascii declared": ("utf-8", declared("us-ascii"), "猫", True),
}


@pytest.mark.parametrize("encoding, declaration, name, told", XML.values(), ids=XML)
def test_xml_in_any_encoding(tmp_path, encoding, declaration, name, told):
    given = write_voc(tmp_path, text(declaration, name).encode(encoding))
    dataset = voc_folder(**given)
    assert class_names(dataset) == [name]
    assert dataset_dicts(dataset=dataset)[0]["annotations"][0]["bbox"] == [1, 2, 11, 12]
    kinds = list(dataset_report(dataset).dropped)
    assert len(kinds) == told and all("read as utf-8" in kind for kind in kinds)


@pytest.mark.parametrize(
    "data, message",
    [
        (text(declared("my-charset"), "狗").encode("gbk"), "declares the encoding 'my-charset'"),
        (text(declared("utf-8"), "狗").encode("gbk"), "declares the encoding 'utf-8'"),
        (text("", "狗").encode("gbk"), "is not text in utf-8"),
        (text("", "a")[:100].encode(), "is not valid XML"),
        (b"", "is not valid XML"),
        (b"\0\5\x16\7\0\2", "a.xml is not"),
        (b"\x89PNG\r\n", "a.xml is not"),
        (text("", "a\0b").encode(), "is not valid XML"),
    ],
)
def test_xml_that_is_none_is_one_line(tmp_path, data, message):
    with pytest.raises(UserError, match=message) as e:
        voc_folder(**write_voc(tmp_path, data))
    assert "a.xml" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("tag", ['annotation xmlns="http://example.org/voc"',
                                 'annotation xmlns:x="http://example.org/voc"'])  # fmt: skip
def test_xml_with_namespaces(tmp_path, tag):
    dataset = voc_folder(**write_voc(tmp_path, text(declared("utf-8"), "cat", tag).encode()))
    assert len(dataset_dicts(dataset=dataset)[0]["annotations"]) == 1


def test_folder_in_the_place_of_a_file_is_one_line(tmp_path, caplog):
    given = write_voc(tmp_path, b"")
    (tmp_path / "Annotations/a.xml").unlink()
    (tmp_path / "Annotations/a.xml").mkdir()
    with caplog.at_level(logging.ERROR), pytest.raises(UserError, match=r"a\.xml does not exist"):
        voc_folder(**given, classes=["cat"])

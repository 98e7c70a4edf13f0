"""Pixels that agree with the annotations, and images that are refused in one line."""

import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from dfd.data import (
    build_evaluator,
    build_test_loader,
    build_train_loader,
    coco_json,
    dataset_dicts,
    voc_folder,
)
from dfd.data.images import ReadableMapper
from dfd.deploy.draw import draw_boxes
from dfd.errors import UserError
from dfd.research.detections import compare_detections

W, H = 40, 30
BOX = (4, 6, 10, 8)  # x, y, w, h of the one white rectangle, in pixels as stored.
# What EXIF orientations do to (x, y) of a W x H image, on continuous coordinates.
TURNED = {
    1: lambda x, y: (x, y),
    2: lambda x, y: (W - x, y),
    3: lambda x, y: (W - x, H - y),
    4: lambda x, y: (x, H - y),
    5: lambda x, y: (y, x),
    6: lambda x, y: (H - y, x),
    7: lambda x, y: (H - y, W - x),
    8: lambda x, y: (y, W - x),
}


def turned_box(orientation):
    x, y, w, h = BOX
    corners = np.array([TURNED[orientation](*c) for c in ((x, y), (x + w, y + h))])
    return [*corners.min(0).tolist(), *(corners.max(0) - corners.min(0)).tolist()]


def picture(mode="RGB"):
    pixels = np.zeros((H, W, 3), np.uint8)
    pixels[BOX[1] : BOX[1] + BOX[3], BOX[0] : BOX[0] + BOX[2]] = 255
    return Image.fromarray(pixels).convert(mode)


def save_turned(path, orientation, mode="RGB"):
    exif = Image.Exif()
    exif[274] = orientation
    if path.suffix == ".tif":
        picture(mode).save(path, tiffinfo={274: orientation})
    else:
        picture(mode).save(path, exif=exif, **({"quality": 100} if path.suffix == ".jpg" else {}))


def mapper(train=True, **more):
    return DatasetMapper(is_train=train, augmentations=[], image_format="BGR", **more)


def train_item(name, **more):
    loader = build_train_loader(
        dataset=name, mapper=mapper(**more), total_batch_size=1, aspect_ratio_grouping=False
    )
    return next(iter(loader))[0]


def test_item(name):
    return next(iter(build_test_loader(dataset=name, mapper=mapper(train=False))))[0]


test_item.__test__ = False


def write_json(folder, file, box, size, rle=False):
    x, y, w, h = box
    mask = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    if rle:
        mask = mask_util.merge(mask_util.frPyObjects(mask, size[1], size[0]))
        mask = {"size": [size[1], size[0]], "counts": mask["counts"].decode()}
    content = {
        "info": {},
        "images": [{"id": 1, "file_name": file, "width": size[0], "height": size[1]}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "area": w * h,
                         "iscrowd": 0, "segmentation": mask}],
        "categories": [{"id": 1, "name": "thing"}],
    }  # fmt: skip
    (folder / "data.json").write_text(json.dumps(content))
    return {"json": str(folder / "data.json"), "images": str(folder)}


def white(image):
    """x0, y0, x1, y1 of the white pixels of a (3,h,w) image."""
    y, x = torch.where(image.float().mean(0) > 128)
    return [x.min().item(), y.min().item(), x.max().item() + 1, y.max().item() + 1]


def xyxy(box):
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def register_one(record):
    DatasetCatalog.register("dfd_test_images", lambda: [record])
    MetadataCatalog.get("dfd_test_images").thing_classes = ["thing"]
    return "dfd_test_images"


# After orientations 2 to 4 an image has the size that it had before.
AS_STORED = [(5, True), (6, True), (7, True), (8, True)]


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation, as_stored", [(o, False) for o in range(1, 9)] + AS_STORED)
def test_turned_photographs(tmp_path, forget, ending, orientation, as_stored):
    """A size tells in which pixels the annotations are; where it cannot, they are turned ones."""
    save_turned(tmp_path / f"a.{ending}", orientation)
    size = (W, H) if as_stored or orientation < 5 else (H, W)
    box = list(BOX) if as_stored else turned_box(orientation)
    name = coco_json(**write_json(tmp_path, f"a.{ending}", box, size))

    for item in (train_item(name), test_item(name)):
        assert white(item["image"]) == xyxy(box)
        assert (item["width"], item["height"]) == size == tuple(item["image"].shape[:0:-1])
        assert item["file_name"] == str(tmp_path / f"a.{ending}")
    assert train_item(name)["instances"].gt_boxes.tensor.tolist() == [xyxy(box)]


def test_evaluation_of_a_photograph_read_as_stored(tmp_path, forget):
    save_turned(tmp_path / "a.jpg", 6)
    name = coco_json(**write_json(tmp_path, "a.jpg", list(BOX), (W, H)))
    item = test_item(name)
    seen = item["image"].float().mean(0) > 128
    found = Instances((H, W), scores=torch.ones(1), pred_classes=torch.zeros(1, dtype=torch.long))
    found.pred_boxes = Boxes(torch.tensor([white(item["image"])], dtype=torch.float))
    found.pred_masks = seen[None]
    evaluator = build_evaluator(dataset=name)
    evaluator.reset()
    evaluator.process([item], [{"instances": found}])
    results = evaluator.evaluate()
    assert results["bbox"]["AP"] == results["segm"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("rle", [False, True])
def test_masks_of_a_photograph_read_as_stored(tmp_path, forget, rle):
    save_turned(tmp_path / "a.jpg", 6)
    name = coco_json(**write_json(tmp_path, "a.jpg", list(BOX), (W, H), rle))
    more = dict(use_instance_mask=True, instance_mask_format="bitmask")
    item = train_item(name, **more)
    mask = item["instances"].gt_masks.tensor[0]
    assert white(mask[None].float() * 255) == xyxy(BOX) == white(item["image"])


def test_report_draws_what_was_read(tmp_path, forget, monkeypatch):
    save_turned(tmp_path / "a.jpg", 6)
    name = coco_json(**write_json(tmp_path, "a.jpg", list(BOX), (W, H)))

    run = SimpleNamespace(name="run", test_dataset=lambda: name)
    monkeypatch.setattr("dfd.research.detections._detect", lambda run, indices: [None])
    ((file_name, columns),) = compare_detections([run], 1)
    image = read_image(file_name, "RGB")
    drawn = Image.open(io.BytesIO(draw_boxes(image, columns["ground truth"], ["thing"])))
    assert drawn.width > drawn.height


def test_what_was_decided_about_a_turn_is_told_once(tmp_path, forget, caplog):
    save_turned(tmp_path / "a.jpg", 6)
    save_turned(tmp_path / "b.jpg", 3)
    names = [
        coco_json(**write_json(tmp_path, "a.jpg", list(BOX), (W, H))),
    ]
    (tmp_path / "more").mkdir()
    paths = write_json(tmp_path / "more", "b.jpg", list(BOX), (W, H))
    names.append(coco_json(**{**paths, "images": str(tmp_path)}))
    with caplog.at_level(logging.WARNING, "dfd.data.images"):
        for name in names * 2:
            train_item(name)
    told = [r.getMessage() for r in caplog.records if r.name == "dfd.data.images"]
    assert len(told) == 2
    assert "a.jpg" in told[0] and "read without that turn" in told[0]
    assert "b.jpg" in told[1] and "does not tell" in told[1]


def test_size_that_no_turn_explains_is_one_line(tmp_path, forget):
    save_turned(tmp_path / "a.jpg", 6)
    name = coco_json(**write_json(tmp_path, "a.jpg", list(BOX), (W + 1, H)))
    with pytest.raises(UserError, match=r"cannot load image .*a\.jpg \(Mismatched") as e:
        train_item(name)
    assert "\n" not in str(e.value) and "dfd-" not in str(e.value)


def test_swapped_size_without_a_turn_is_one_line(tmp_path, forget):
    picture().save(tmp_path / "a.png")
    name = coco_json(**write_json(tmp_path, "a.png", list(BOX), (H, W)))
    with pytest.raises(UserError, match=r"cannot load image .*a\.png \(Mismatched"):
        test_item(name)


@pytest.mark.parametrize("ending", ["jpg", "tif"])
def test_xml_without_a_size_gets_that_of_the_pixels_that_are_read(tmp_path, forget, ending):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    save_turned(tmp_path / f"JPEGImages/a.{ending}", 6)
    x0, y0, x1, y1 = xyxy(turned_box(6))
    (tmp_path / "Annotations/a.xml").write_text(
        f"<annotation><object><name>thing</name><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}"
        f"</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object></annotation>"
    )
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\n")
    name = voc_folder(root=str(tmp_path), split="train")
    item = train_item(name)
    assert (item["width"], item["height"]) == (H, W)
    assert white(item["image"]) == [x0, y0, x1, y1]


def test_registered_record_in_stored_pixels(tmp_path, forget):
    save_turned(tmp_path / "a.jpg", 8)
    box = {"bbox": list(BOX), "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    record = {"file_name": str(tmp_path / "a.jpg"), "width": W, "height": H, "image_id": 5,
              "annotations": [box]}  # fmt: skip
    name = register_one(record)
    assert white(train_item(name)["image"]) == xyxy(BOX) == white(test_item(name)["image"])


def deep(path, dtype):
    values = np.linspace(0, 60000, W * H).reshape(H, W)
    Image.fromarray(values.astype(dtype)).save(path)


@pytest.mark.parametrize(
    "file, dtype",
    [("a.png", "uint16"), ("a.tif", "uint16"), ("a.tif", ">u2"), ("a.tif", "int32"),
     ("a.tif", "float32"), ("a.pgm", "uint16")],
)  # fmt: skip
def test_deep_images_are_refused_by_name(tmp_path, forget, file, dtype):
    deep(tmp_path / file, dtype)
    name = coco_json(**write_json(tmp_path, file, list(BOX), (W, H)))
    for load in (train_item, test_item):
        with pytest.raises(UserError, match=rf"{file}: .*more than 8 bits .*convert") as e:
            load(name)
        assert "\n" not in str(e.value)


def test_mapper_that_reads_deep_images_by_itself_is_let_and_warned_about(tmp_path, forget, caplog):
    deep(tmp_path / "a.png", "uint16")
    name = coco_json(**write_json(tmp_path, "a.png", list(BOX), (W, H)))

    def own(record):
        return np.asarray(Image.open(record["file_name"])).max()

    with caplog.at_level(logging.WARNING, "dfd.data.images"):
        assert next(iter(build_test_loader(dataset=name, mapper=own)))[0] == 60000
    assert "more than 8 bits" in caplog.text


def test_mapper_that_opens_files_by_itself_gets_the_file(tmp_path, forget):
    save_turned(tmp_path / "a.jpg", 6)
    name = coco_json(**write_json(tmp_path, "a.jpg", list(BOX), (W, H)))
    loader = build_test_loader(dataset=name, mapper=lambda r: Image.open(r["file_name"]).size)
    assert list(loader) == [[(W, H)]]


KINDS = {
    "png": ["1", "L", "LA", "P", "RGB", "RGBA"],
    "jpg": ["L", "RGB", "CMYK"],
    # Pillow before 13, the last for Python 3.10, cannot read the YCbCr that it writes.
    "tif": ["1", "L", "P", "RGBA", "CMYK"] + ["YCbCr"] * (PIL.__version__ >= "13"),
    "bmp": ["1", "L", "P", "RGB"],
    "webp": ["RGB", "RGBA"],
    "gif": ["L", "P"],
}


@pytest.mark.parametrize("ending, mode", [(e, m) for e, modes in KINDS.items() for m in modes])
def test_other_kinds_of_images_are_read_as_detectron2_reads_them(tmp_path, forget, ending, mode):
    picture(mode).save(tmp_path / f"a.{ending}")
    name = coco_json(**write_json(tmp_path, f"a.{ending}", list(BOX), (W, H)))
    image = train_item(name)["image"]
    expected = read_image(str(tmp_path / f"a.{ending}"), "BGR").transpose(2, 0, 1)
    assert torch.equal(image, torch.as_tensor(expected.copy()))
    assert white(image) == xyxy(BOX)


@pytest.mark.parametrize("ending", ["gif", "tif", "png"])
def test_first_of_several_pictures_is_read_and_told(tmp_path, forget, caplog, ending):
    more = picture().transpose(Image.Transpose.ROTATE_180)
    picture().save(tmp_path / f"a.{ending}", save_all=True, append_images=[more])
    name = coco_json(**write_json(tmp_path, f"a.{ending}", list(BOX), (W, H)))
    with caplog.at_level(logging.WARNING, "dfd.data.images"):
        assert white(train_item(name)["image"]) == xyxy(BOX)
    assert f"a.{ending}: it holds several pictures: the first is read" in caplog.text


def damage(path: Path, how: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "html":
        path.write_text("<!DOCTYPE html><html>404</html>")
    elif how == "chunk":  # Pillow raises SyntaxError.
        path.write_bytes(data.replace(b"IDAT", b"\0\0\0\0"))


@pytest.mark.parametrize(
    "file, how, message",
    [(f"a.{e}", "truncated", "truncated|decoder|identify")
     for e in ("png", "jpg", "bmp", "gif", "webp", "tif")]
    + [("a.jpg", "empty", "the file is empty"), ("a.jpg", "html", "cannot identify image file"),
       ("a.png", "chunk", "cannot load image"), ("a.png", "gigantic", "cut into tiles")],
)  # fmt: skip
def test_damaged_images_are_one_line(tmp_path, forget, monkeypatch, file, how, message):
    damage(tmp_path / file, how)
    if how == "gigantic":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", W * H // 3)
    name = coco_json(**write_json(tmp_path, file, list(BOX), (W, H)))
    for load in (train_item, test_item):
        with pytest.raises(UserError, match=message) as e:
            load(name)
        assert str(e.value).startswith(f"cannot load image {tmp_path / file} (")
        assert "\n" not in str(e.value)


def test_mapper_that_fails_for_another_reason_is_not_blamed_on_the_image(tmp_path, forget):
    picture().save(tmp_path / "a.png")
    name = coco_json(**write_json(tmp_path, "a.png", list(BOX), (W, H)))

    def broken(record):
        return record["no such key"]

    with pytest.raises(KeyError, match="no such key"):
        next(iter(build_test_loader(dataset=name, mapper=broken)))
    assert dataset_dicts(dataset=name)


def test_an_image_without_width_once_it_is_resized_is_named(tmp_path):
    path = str(tmp_path / "thin.png")
    Image.new("RGB", (3000, 1)).save(path)
    resize = T.ResizeShortestEdge(800, 1333)
    mapper = DatasetMapper(is_train=False, augmentations=[resize], image_format="BGR")
    with pytest.raises(UserError, match=r"load image .*thin.png \(.*\): repair or leave out"):
        ReadableMapper(mapper)({"file_name": path, "width": 3000, "height": 1})

"""Values of annotations that are not what they should be: every reader treats them alike."""

import copy
import functools
import itertools
import json
import math
import pathlib
import xml.etree.ElementTree as ElementTree

import cv2
import detectron2.data.transforms as T
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from dfd.data import (
    TwoSizeMapper,
    build_evaluator,
    build_test_loader,
    build_train_loader,
    class_names,
    coco_json,
    dataset_dicts,
    dataset_report,
    voc_folder,
)
from dfd.data.masks import decoded_counts
from dfd.errors import UserError

WIDTH, HEIGHT = 40, 30
NUMBERS = itertools.count()
POLYGON = [1.0, 2.0, 11.0, 2.0, 11.0, 10.0, 1.0, 10.0]
PIXELS = [[int(1 <= x < 11 and 2 <= y < 10) for x in range(WIDTH)] for y in range(HEIGHT)]
UNCOMPRESSED = {"size": [HEIGHT, WIDTH], "counts": [100, 50, HEIGHT * WIDTH - 150]}
COMPRESSED = mask_util.frPyObjects(UNCOMPRESSED, HEIGHT, WIDTH)
TEXT = {**COMPRESSED, "counts": COMPRESSED["counts"].decode()}


def content():
    """Three annotations on two images; the first is the one that the tests change."""
    return {
        "info": {},
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (1, 2)
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 8], "area": 80,
             "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 2, "bbox": [20, 10, 12, 15], "area": 180,
             "iscrowd": 0},
            {"id": 3, "image_id": 2, "category_id": 2, "bbox": [0, 0, 40, 30], "area": 1200,
             "iscrowd": 0},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }  # fmt: skip


OBJECTS = {
    ("1.png", "cat", (1, 2, 11, 10)),
    ("1.png", "dog", (20, 10, 32, 25)),
    ("2.png", "dog", (0, 0, 40, 30)),
}


def write_images(folder):
    for i in (1, 2):
        cv2.imwrite(str(folder / f"{i}.png"), np.zeros((HEIGHT, WIDTH, 3), np.uint8))


def as_records(data, folder):
    """What user code would make of the same content."""
    by_image = {}
    for a in data["annotations"]:
        kept = {k: v for k, v in a.items() if k not in ("id", "image_id")}
        if type(kept.get("category_id")) in (int, float):
            kept["category_id"] -= 1
        by_image.setdefault(f"{a['image_id']}.png", []).append(
            {**kept, "bbox_mode": BoxMode.XYWH_ABS}
        )
    for image in data["images"]:
        rest = {k: v for k, v in image.items() if k not in ("id", "file_name")}
        name = str(folder / image["file_name"])
        yield {**rest, "file_name": name, "image_id": image["id"],
               "annotations": by_image.get(image["file_name"], [])}  # fmt: skip


@pytest.fixture
def read(tmp_path):
    """Registers content by one of the ways; returns the name."""
    names = []

    def read(way, data):
        write_images(tmp_path)
        path = tmp_path / f"{next(NUMBERS)}.json"
        if way != "records":
            path.write_text(json.dumps(data))
        if way == "coco_json":
            return coco_json(json=str(path), images=str(tmp_path))
        name = f"dfd_test_values_{next(NUMBERS)}"
        names.append(name)
        if way == "register_coco_instances":
            register_coco_instances(name, {}, str(path), str(tmp_path))
        elif way == "load_coco_json":
            function = functools.partial(load_coco_json, str(path), str(tmp_path), name)
            DatasetCatalog.register(name, lambda: function())
        else:
            records = data if isinstance(data, list) else list(as_records(data, tmp_path))
            DatasetCatalog.register(name, lambda: copy.deepcopy(records))
            MetadataCatalog.get(name).thing_classes = ["cat", "dog"]
        return name

    yield read
    for name in names:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


WAYS = pytest.mark.parametrize("way", ["coco_json", "register_coco_instances", "records"])


def objects_of(name):
    classes = class_names(name)
    return {
        (
            pathlib.Path(record["file_name"]).name,
            classes[a["category_id"]],
            tuple(BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS)),
        )
        for record in dataset_dicts(dataset=name, filter_empty=False)
        for a in record["annotations"]
        if not a.get("iscrowd", 0)
    }


def test_mapper():
    return DatasetMapper(is_train=False, augmentations=[], image_format="BGR")


test_mapper.__test__ = False


def evaluate(name, *, masks=False, keypoints=None, predict=True, **more):
    """Results for predictions that are the labels of the test data."""
    evaluator = build_evaluator(dataset=name, **more)
    evaluator.reset()
    records = {r["file_name"]: r for r in dataset_dicts(dataset=name, filter_empty=False)}
    for (image,) in build_test_loader(dataset=name, mapper=test_mapper()):
        labels = records[image["file_name"]]["annotations"] if predict else []
        labels = [a for a in labels if not a.get("iscrowd", 0)]
        boxes = [BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in labels]
        output = Instances((image["height"], image["width"]))
        output.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        output.scores = torch.ones(len(boxes))
        output.pred_classes = torch.tensor([a["category_id"] for a in labels], dtype=torch.long)
        if masks:
            output.pred_masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.bool)
        if keypoints is not None:
            points = [(a.get("keypoints", []) + [1.0] * 99)[: 3 * keypoints] for a in labels]
            output.pred_keypoints = torch.tensor(points).float().reshape(len(boxes), -1, 3)
        evaluator.process([image], [{"instances": output}])
    return evaluator.evaluate()


def change(**values):
    """The first annotation takes the values; ... removes one."""
    data = content()
    annotation = data["annotations"][0]
    annotation.update(values)
    for key in [k for k, v in annotation.items() if v is ...]:
        del annotation[key]
    return data


def change_image(**values):
    data = content()
    data["images"][0].update(values)
    for key in [k for k, v in data["images"][0].items() if v is ...]:
        del data["images"][0][key]
    return data


READ_ALIKE = {
    "nothing": (change(), None),
    "iscrowd as text": (change(iscrowd="0"), "iscrowd converted"),
    "iscrowd null": (change(iscrowd=None), "iscrowd converted"),
    "iscrowd empty": (change(iscrowd=""), "iscrowd converted"),
    "iscrowd bool": (change(iscrowd=False), None),
    "iscrowd whole float": (change(iscrowd=0.0), None),
    "iscrowd absent": (change(iscrowd=...), None),
    "area absent": (change(area=...), None),
    "area as text": (change(area="80"), "areas converted"),
    "area null": (change(area=None), "areas computed"),
    "area a list": (change(area=[80]), "areas computed"),
    "area NaN": (change(area=math.nan), "areas computed"),
    "area infinite": (change(area=math.inf), "areas computed"),
    "area negative": (change(area=-80), "areas computed"),
    "area 0": (change(area=0), "areas computed"),
    "area beyond the image": (change(area=1e12), "areas computed"),
    "area beyond floats": (change(area=10**400), "areas computed"),
    "area bool": (change(area=True), "areas computed"),
    "area is word": (change(area="large"), "areas computed"),
    "class id a whole float": (change(category_id=1.0), None),
    "class as name": (change(category_id="cat"), "class ids converted"),
    "box as text": (change(bbox=["1", " 2.0", "10", "8"]), "boxes converted"),
    "size as text": (change_image(width="40", height="30"), "image sizes converted"),
    "size whole floats": (change_image(width=40.0, height=30.0), None),
    "size absent": (change_image(width=..., height=...), "image sizes taken"),
    "width absent": (change_image(width=...), "image sizes taken"),
    "width null": (change_image(width=None), "image sizes taken"),
    "height 0": (change_image(height=0), "image sizes taken"),
    "height negative": (change_image(height=-30), "image sizes taken"),
    "width NaN": (change_image(width=math.nan), "image sizes taken"),
    "width a list": (change_image(width=[40]), "image sizes taken"),
    "width beyond floats": (change_image(width=10**400), "image sizes taken"),
    "width beyond floats, as text": (change_image(width="9" * 400), "image sizes taken"),
    "segmentation null": (change(segmentation=None), None),
    "segmentation []": (change(segmentation=[]), None),
    "segmentation [[]]": (change(segmentation=[[]]), None),
    "segmentation {}": (change(segmentation={}), None),
    "flat polygon": (change(segmentation=POLYGON), "masks converted"),
    "polygon of points": (
        change(segmentation=[[[1, 2], [11, 2], [11, 10]]]), "masks converted",
    ),
    "points": (change(segmentation=[[1, 2], [11, 2], [11, 10]]), "masks converted"),
    "polygon as text": (change(segmentation=[[str(v) for v in POLYGON]]), "masks converted"),
    "mask pixel by pixel": (change(segmentation=PIXELS), "masks converted, given pixel"),
    "mask of true and false": (
        change(segmentation=[[bool(v) for v in row] for row in PIXELS]),
        "masks converted, given pixel",
    ),
    "run lengths": (change(segmentation=UNCOMPRESSED), None),
    "compressed run lengths": (change(segmentation=TEXT), None),
    "keypoints null": (change(keypoints=None), None),
    "keypoints of 2 numbers": (change(keypoints=[1, 2]), "keypoints dropped"),
    "keypoints with null": (change(keypoints=[1, None, 2]), "keypoints dropped"),
    "keypoints visible 7": (change(keypoints=[1, 1, 7]), "keypoints dropped"),
}  # fmt: skip


@WAYS
@pytest.mark.parametrize("case", READ_ALIKE)
def test_right_reading_and_a_counted_notice(read, way, case):
    data, notice = READ_ALIKE[case]
    name = read(way, data)
    assert objects_of(name) == OBJECTS
    assert notice_of(name, notice) == (0 if notice is None else 1)
    result = evaluate(name)["bbox"]
    assert result["AP"] == pytest.approx(100)
    # Small goes by the area: two objects are, and the third is medium.
    assert result["APs"] == result["APm"] == pytest.approx(100) and math.isnan(result["APl"])


def notice_of(name, kind):
    dropped = dataset_report(name).dropped
    if kind is None:
        assert not dropped
        return 0
    (key,) = dropped
    assert key.startswith(kind), dropped
    return dropped[key]


DROPPED_ALIKE = {
    "box of 3": (change(bbox=[1, 2, 3]), "without four box numbers"),
    "box of 5": (change(bbox=[1, 2, 3, 4, 5]), "without four box numbers"),
    "box null": (change(bbox=None), "without four box numbers"),
    "box absent": (change(bbox=...), "without four box numbers"),
    "box a word": (change(bbox="1234"), "without four box numbers"),
    "box a dict": (change(bbox={"1": 0, "2": 0, "3": 0, "4": 0}), "without four box numbers"),
    "box nested": (change(bbox=[[1, 2, 10, 8]]), "without four box numbers"),
    "box of bools": (change(bbox=[True, True, True, True]), "without four box numbers"),
    "box with null": (change(bbox=[1, 2, None, 8]), "without four box numbers"),
    "box with a word": (change(bbox=[1, 2, "wide", 8]), "without four box numbers"),
    "box NaN": (change(bbox=[1, 2, math.nan, 8]), "not finite"),
    "box infinite": (change(bbox=[1, 2, math.inf, 8]), "not finite"),
    "box NaN as text": (change(bbox=[1, 2, "nan", 8]), "not finite"),
    "box beyond floats": (change(bbox=[1, 2, 10**400, 8]), "not finite"),
    "box negative": (change(bbox=[1, 2, -10, 8]), "without area"),
    "box outside": (change(bbox=[100, 2, 10, 8]), "outside the image"),
    "polygon of 2 points": (change(segmentation=[[1, 2, 3, 4]]), "less than 3 points"),
    "polygon of 7 numbers": (change(segmentation=[POLYGON[:7]]), "cannot be read"),
    "polygon with null": (change(segmentation=[[*POLYGON[:7], None]]), "cannot be read"),
    "polygon with NaN": (change(segmentation=[[*POLYGON[:7], math.nan]]), "cannot be read"),
    "polygon beyond floats": (change(segmentation=[[*POLYGON[:7], 10**400]]), "cannot be read"),
    "polygon with a word": (change(segmentation=[[*POLYGON[:7], "x"]]), "cannot be read"),
    "polygon beside a number": (change(segmentation=[POLYGON, 3]), "cannot be read"),
    "mask is a word": (change(segmentation="mask"), "cannot be read"),
    "mask is true": (change(segmentation=True), "cannot be read"),
    "runs without counts": (change(segmentation={"size": [HEIGHT, WIDTH]}), "cannot be read"),
    "runs without size": (change(segmentation={"counts": [1200]}), "cannot be read"),
    "counts null": (change(segmentation={**TEXT, "counts": None}), "cannot be read"),
    "counts too few": (change(segmentation={**UNCOMPRESSED, "counts": [9]}), "cannot be read"),
    "counts negative": (
        change(segmentation={**UNCOMPRESSED, "counts": [-1, 1201]}), "cannot be read",
    ),
    "counts are a word": (change(segmentation={**TEXT, "counts": "word"}), "cannot be read"),
    "counts empty text": (change(segmentation={**TEXT, "counts": ""}), "cannot be read"),
    "polygon without an area": (change(segmentation=[[1.0] * 6]), "without a pixel"),
    "polygon on a line": (change(segmentation=[[1, 5, 9, 5, 4, 5]]), "without a pixel"),
    "polygon outside": (change(segmentation=[[50, 2, 60, 2, 60, 9]]), "without a pixel"),
    "polygon left of it": (change(segmentation=[[-9, 2, -1, 2, -1, 9]]), "without a pixel"),
    "runs without a pixel": (
        change(segmentation={**UNCOMPRESSED, "counts": [HEIGHT * WIDTH]}), "without a pixel",
    ),
    "pixels of another size": (change(segmentation=[[0, 1] * 30] * 50), "of another size"),
    "pixels, none set": (change(segmentation=[[0] * WIDTH] * HEIGHT), "without a pixel"),
    "side of no pixel": (change(bbox=[1, 2, 1e-9, 8]), "without area"),
    "runs of another size": (
        change(segmentation={"size": [10, 10], "counts": [100]}), "of another size",
    ),
    "runs turned": (
        change(segmentation={**UNCOMPRESSED, "size": [WIDTH, HEIGHT]}), "of another size",
    ),
}  # fmt: skip


@WAYS
@pytest.mark.parametrize("case", DROPPED_ALIKE)
def test_annotation_dropped_and_counted(read, way, case):
    data, kind = DROPPED_ALIKE[case]
    name = read(way, data)
    assert objects_of(name) == {o for o in OBJECTS if o[1] != "cat"}
    ((key, count),) = dataset_report(name).dropped.items()
    assert "dropped" in key and kind in key and count == 1
    assert "image 1" in dataset_report(name).examples[key]
    if kind not in ("without area", "outside the image") or way != "register_coco_instances":
        assert evaluate(name)["bbox"]["AP"] == pytest.approx(100)


REFUSED_ALIKE = {
    "iscrowd 2": (change(iscrowd=2), "image 1.* has iscrowd 2: it must be 0 or 1"),
    "iscrowd a word": (change(iscrowd="maybe"), "has iscrowd 'maybe'"),
    "iscrowd a list": (change(iscrowd=[0]), r"has iscrowd \[0\]"),
    "iscrowd NaN": (change(iscrowd=math.nan), "has iscrowd nan"),
    "class absent": (change(category_id=...), "1 annotations have a .*None"),
    "class null": (change(category_id=None), "1 annotations have a .*None"),
    "class 1.5": (change(category_id=1.5), "1 annotations have a .*[01][.]5"),
    "class unknown": (change(category_id=7), "1 annotations have a .*category_id"),
    "class unknown name": (change(category_id="cow"), "1 annotations have a .*cow"),
    "class a list": (change(category_id=[1]), r"1 annotations have a .*\[1\]"),
    "class true": (change(category_id=True), "1 annotations have a .*True"),
    "class NaN": (change(category_id=math.nan), "1 annotations have a .*nan"),
    "class beyond bounds": (change(category_id=10**30), "1 annotations have a .*category_id"),
    "two ids in collision": (
        change_image(id="2"),
        "image id 2 occurs twice .*'2' and as 2",
    ),
    "image id 1.5": (change_image(id=1.5), "an image has the id 1.5: "),
    "image id a list": (change_image(id=[1]), r"an image has the id \[1\]: "),
    "image id true": (change_image(id=True), "an image has the id True: "),
    "image id empty": (change_image(id=""), "an image has the id '': "),
    "image id NaN": (change_image(id=math.nan), "an image has the id nan: "),
    "image id beyond 64 bits": (change_image(id=2**63), "at most 64 bits"),
    "image id null": (change_image(id=None), "an image has the id None: "),
    "one id for two images": (change_image(id=2), "image id 2 occurs twice: make it unique"),
}  # fmt: skip


@WAYS
@pytest.mark.parametrize("case", REFUSED_ALIKE)
def test_refused_in_one_line(read, way, case):
    data, message = REFUSED_ALIKE[case]
    if way == "records":
        data = list(as_records(data, pathlib.Path("absent")))
    with pytest.raises(UserError, match=message) as e:
        dataset_dicts(dataset=read(way, data), filter_empty=False)
    assert "\n" not in str(e.value)


COCO_ONLY = {
    "annotation ids as text": [("annotations", 0, "id", "1")],
    "annotation id null": [("annotations", 0, "id", None)],
    "annotation id absent": [("annotations", 0, "id", ...)],
    "annotation id a list": [("annotations", 0, "id", [1])],
    "annotation id 0": [("annotations", 0, "id", 0)],
    "annotation id beyond floats": [("annotations", 0, "id", 2**53)],
    "annotation ids twice": [("annotations", 0, "id", 2)],
    "category ids as text in annotations": [("annotations", i, "category_id", v)
                                            for i, v in enumerate("122")],
    "category ids as text in categories": [("categories", i, "id", str(i + 1)) for i in (0, 1)],
    "category ids with leading zeros": [("categories", i, "id", f"00{i + 1}") for i in (0, 1)],
    "category ids as whole floats": [("categories", i, "id", i + 1.0) for i in (0, 1)],
    "category names with blanks": [("categories", 0, "name", " cat ")],
    "image ids as text in images": [("images", i, "id", str(i + 1)) for i in (0, 1)],
    "image ids with leading zeros": [("images", i, "id", f"00{i + 1}") for i in (0, 1)],
    "image ids as text in annotations": [("annotations", i, "image_id", v)
                                         for i, v in enumerate("112")],
    "image ids as floats in annotations": [("annotations", i, "image_id", v)
                                           for i, v in enumerate((1.0, 1.0, 2.0))],
    "image ids as text on both sides": [("images", i, "id", str(i + 1)) for i in (0, 1)]
    + [("annotations", i, "image_id", v) for i, v in enumerate("112")],
    "image ids of two kinds": [("images", 0, "id", "1")],
    "image ids of two kinds, one a name": [("images", 0, "id", "a")]
    + [("annotations", i, "image_id", "a") for i in (0, 1)],
}  # fmt: skip


@pytest.mark.parametrize("way", ["coco_json", "register_coco_instances"])
@pytest.mark.parametrize("case", COCO_ONLY)
def test_ids_of_any_kind_are_joined_and_evaluated(read, way, case):
    data = content()
    for part, i, key, value in COCO_ONLY[case]:
        data[part][i][key] = value
        if value is ...:
            del data[part][i][key]
    name = read(way, data)
    assert objects_of(name) == OBJECTS
    assert evaluate(name)["bbox"]["AP"] == pytest.approx(100)
    told = bool(dataset_report(name).dropped)
    same = "annotation id" in case or "float" in case or "both sides" in case
    assert told is not same


@pytest.mark.parametrize("way", ["coco_json", "register_coco_instances"])
@pytest.mark.parametrize(
    "categories, message",
    [
        ([{"id": 1.5, "name": "cat"}], "needs an integer `id`"),
        ([{"id": True, "name": "cat"}], "needs an integer `id`"),
        ([{"id": None, "name": "cat"}], "needs an integer `id`"),
        ([{"id": "cat", "name": "cat"}], "needs an integer `id`"),
        ([{"id": [1], "name": "cat"}], "needs an integer `id`"),
        ([{"id": 2**63, "name": "cat"}], "needs an integer `id`"),
        ([{"name": "cat"}], "needs an integer `id`"),
        (["cat"], "needs an integer `id`"),
        ([{"id": 1, "name": None}], "a class has the name None"),
        ([{"id": 1, "name": "  "}], "a class has the name '  '"),
        ([{"id": 1, "name": True}], "a class has the name True"),
        ([{"id": 1, "name": ["cat"]}], "a class has the name"),
        ([{"id": 1, "name": "a"}, {"id": "01", "name": "b"}], "two categories have the same id"),
        ([{"id": 1, "name": "a"}, {"id": 2, "name": "a "}], "two categories have the same name"),
        ([{"id": 1, "name": 3}, {"id": 2, "name": "3"}], "two categories have the same name"),
    ],
)
def test_categories_that_are_refused(read, way, categories, message):
    with pytest.raises(UserError, match=message) as e:
        class_names(read(way, {**content(), "categories": categories}))
    assert "\n" not in str(e.value)


def test_a_class_that_could_be_two_is_refused(read):
    data = change(category_id="1")
    data["categories"] = [{"id": 1, "name": "2"}, {"id": 2, "name": "1"}]
    with pytest.raises(UserError, match="1 annotations .*category_id='1'"):
        read("coco_json", data)


def test_annotations_of_no_image_are_counted_whichever_way_the_json_comes(read):
    for way in ("coco_json", "register_coco_instances", "load_coco_json"):
        name = read(way, change(image_id=9))
        assert objects_of(name) == {o for o in OBJECTS if o[1] != "cat"}
        assert notice_of(name, "annotations dropped, of an image that is not listed") == 1


def test_json_that_load_coco_json_cannot_read_is_refused_in_one_line(read):
    for data in (change_image(id=None), change(category_id="1"), change(image_id=[1])):
        with pytest.raises(UserError, match="cannot be read") as e:
            dataset_dicts(dataset=read("load_coco_json", data))
        assert "\n" not in str(e.value)


def test_values_that_load_coco_json_leaves_as_they_are(read):
    data = change(iscrowd="0", bbox=["1", "2", "10", "8"])
    name = read("load_coco_json", data)
    assert objects_of(name) == OBJECTS and evaluate(name)["bbox"]["AP"] == pytest.approx(100)


def records(tmp_path):
    write_images(tmp_path)
    return list(as_records(content(), tmp_path))


def as_numpy(value):
    if isinstance(value, dict):
        return {k: as_numpy(v) for k, v in value.items()}
    if isinstance(value, list) and value and all(isinstance(v, int | float) for v in value):
        return np.array(value, dtype=np.float32)
    if isinstance(value, list):
        return [as_numpy(v) for v in value]
    if isinstance(value, BoxMode):
        return value
    kind = {bool: np.bool_, int: np.int64, float: np.float32}.get(type(value))
    return kind(value) if kind else value


def test_numpy_and_paths_are_read_without_a_word(read, tmp_path):
    given = records(tmp_path)
    given[0]["annotations"][0]["segmentation"] = [POLYGON]
    given[0]["annotations"][1]["segmentation"] = np.array([POLYGON])
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[3:9, 5:20] = True
    given[1]["annotations"][0]["segmentation"] = mask
    given = as_numpy(given)
    for record in given:
        record["file_name"] = pathlib.Path(record["file_name"])
    name = read("records", given)
    assert objects_of(name) == OBJECTS and not dataset_report(name).dropped
    first, second = dataset_dicts(dataset=name)
    json.dumps([first, {**second, "annotations": []}])  # Nothing of numpy is left.
    decoded = mask_util.decode(second["annotations"][0]["segmentation"])
    assert (decoded == mask).all()
    assert evaluate(name)["bbox"]["AP"] == pytest.approx(100)


def test_boxes_as_tensors(read, tmp_path):
    given = records(tmp_path)
    given[0]["annotations"][0]["bbox"] = torch.tensor([1, 2, 10, 8])
    assert objects_of(read("records", given)) == OBJECTS


def test_records_without_ids_or_annotations(read, tmp_path):
    given = records(tmp_path)
    for record in given:
        del record["image_id"]
    del given[1]["annotations"]
    name = read("records", given)
    assert [r["image_id"] for r in dataset_dicts(dataset=name, filter_empty=False)] == [1, 2]
    assert notice_of(name, "image ids given") == 2
    assert objects_of(name) == {o for o in OBJECTS if o[0] == "1.png"}
    assert evaluate(name)["bbox"]["AP"] == pytest.approx(100)


def test_modes_of_boxes(read, tmp_path):
    given = records(tmp_path)
    given[0]["annotations"][0]["bbox_mode"] = "BoxMode.XYWH_ABS"
    given[0]["annotations"][1]["bbox_mode"] = np.int64(1)
    given[1]["annotations"][0] = {
        "bbox": [20, 15, 40, 30, 0], "bbox_mode": BoxMode.XYWHA_ABS, "category_id": 1,
    }  # fmt: skip
    name = read("records", given)
    assert objects_of(name) == OBJECTS
    assert len(dataset_dicts(dataset=name)[1]["annotations"][0]["bbox"]) == 5
    assert evaluate(name)["bbox"]["AP"] == pytest.approx(100)
    for mode in (..., None, 9, "xywh", BoxMode.XYWH_REL, True):
        given[0]["annotations"][0]["bbox_mode"] = mode
        if mode is ...:
            del given[0]["annotations"][0]["bbox_mode"]
        with pytest.raises(UserError, match="an annotation of image 1 .* has bbox_mode"):
            dataset_dicts(dataset=read("records", given))


def test_records_that_are_none(read, tmp_path):
    for given, message in (
        ([3], "every record must be a dict, not 3"),
        ([{"image_id": 1, "width": 1, "height": 1}], "every image needs a `file_name`"),
        ([{"file_name": 3, "image_id": 1}], "every image needs a `file_name`"),
        ([{"file_name": "a", "image_id": 1, "annotations": 3}], "has annotations 3: give a list"),
        ([{"file_name": "a", "annotations": [3]}], "every annotation must be a dict, not 3"),
        ([{"file_name": "a", "image_id": 1}, {"file_name": "b"}], "an image has the id None"),
    ):
        with pytest.raises(UserError, match=message) as e:
            dataset_dicts(dataset=read("records", given))
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("names", [["cat", None], ["cat", "cat "], ["", "dog"]])
def test_class_names_of_other_code(read, tmp_path, names):
    name = read("records", records(tmp_path))
    MetadataCatalog.pop(name)
    MetadataCatalog.get(name).thing_classes = names
    with pytest.raises(UserError, match=f"dataset {name}: "):
        class_names(name)


@pytest.mark.parametrize(
    "data, same",
    [
        (content(), True),
        (change(area="80"), False),
        (change_image(id=5), False),
        (change(bbox=[3, 2, 10, 8]), False),
        (change(category_id=2), False),
        (change(iscrowd=1), False),
        ({**content(), "annotations": content()["annotations"][1:]}, False),
        ({**content(), "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]}, False),
    ],
)
def test_a_json_that_other_code_names_is_the_ground_truth_only_where_it_fits(
    read, tmp_path, data, same
):
    path = tmp_path / "named.json"
    path.write_text(json.dumps(data))
    name = read("records", records(tmp_path))
    ids = {1: 0, 2: 1}
    MetadataCatalog.get(name).set(json_file=str(path), thing_dataset_id_to_contiguous_id=ids)
    assert (dataset_report(name).ground_truth == str(path)) is same
    assert evaluate(name)["bbox"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("ids", [{"1": 0, "2": 1}, {1: 0, 2: 0}, {7: 0}, {7: 0, 9: 0}, [0, 1]])
def test_category_ids_of_other_code_that_are_no_map(read, tmp_path, ids):
    name = read("records", records(tmp_path))
    MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id = ids
    assert evaluate(name)["bbox"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("name", ["my/data", "../../evil", "/abs", "x" * 300, "..", "Käse"])
def test_ground_truth_stays_in_its_folder_whatever_the_name(tmp_path, name):
    write_images(tmp_path)
    found = records(tmp_path)
    DatasetCatalog.register(name, lambda: found)
    MetadataCatalog.get(name).thing_classes = ["cat", "dog"]
    out = tmp_path / "a" / "b" / "out"
    try:
        evaluate(name, output_dir=str(out))
        with pytest.raises(UserError, match="output_dir .* cannot be made"):
            build_evaluator(dataset=name, output_dir=found[0]["file_name"])
    finally:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)
    assert len(list(out.glob("*_ground_truth.json"))) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"1.png", "2.png", "a"}


@WAYS
@pytest.mark.parametrize("far", [1e8, -1e9, 1e308])
def test_outline_without_an_end_is_dropped(read, way, far):
    name = read(way, change(segmentation=[[1, 1, far, 5, 3, far]]))
    (key,) = dataset_report(name).dropped
    assert key == "annotations dropped, mask cannot be read"


@pytest.mark.parametrize("way", ["coco_json", "register_coco_instances"])
@pytest.mark.parametrize(
    "mask",
    [
        [[], [1, 2, 11, 2, 11, 10, 1, 10]],
        [[1, 2, 3, 4], [1, 2, 11, 2, 11, 10, 1, 10]],
        {"size": ["30", "40"], "counts": [32, 8, 1160]},
    ],
)
def test_masks_that_pycocotools_cannot_use_are_written_anew(read, way, mask):
    data = change(segmentation=mask)
    for annotation in data["annotations"][1:]:
        annotation["segmentation"] = [[1, 2, 11, 2, 11, 10, 1, 10]]
    name = read(way, data)
    assert dataset_report(name).ground_truth is None
    assert "segm" in evaluate(name, masks=True)


@WAYS
def test_pixels_and_their_outline_are_one_mask(read, way):
    x, y, w, h = 1, 2, 10, 8
    outline = [x, y, x + w, y, x + w, y + h, x, y + h]
    masks = []
    for segmentation in ([outline], PIXELS):
        data = change(segmentation=segmentation)
        for annotation in data["annotations"][1:]:
            annotation["segmentation"] = [outline]
        name = read(way, data)
        record = dataset_dicts(dataset=name, filter_empty=False)[0]
        mask = record["annotations"][0]["segmentation"]
        if isinstance(mask, list):
            mask = mask_util.merge(mask_util.frPyObjects(mask, HEIGHT, WIDTH))
        masks.append(mask_util.decode(mask))
        assert "segm" in evaluate(name, masks=True)
    assert masks[0].sum() == w * h and np.array_equal(*masks)


@pytest.mark.parametrize("names", ["cat", {"cat", "dog"}, {0: "cat", 1: "dog"}])
def test_class_names_that_are_no_list(read, tmp_path, names):
    name = read("records", records(tmp_path))
    MetadataCatalog.pop(name)
    MetadataCatalog.get(name).thing_classes = names
    with pytest.raises(UserError, match="give a list"):
        dataset_dicts(dataset=name)
    with pytest.raises(UserError, match="give a list"):
        voc_folder(root=str(tmp_path), split="train", classes=names)


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), ElementTree.ParseError("no"), StopIteration(), EOFError()]
)
def test_function_of_other_code_that_fails_is_one_line(forget, error):
    def fail():
        raise error

    DatasetCatalog.register("dfd_test_fails", fail)
    MetadataCatalog.get("dfd_test_fails").thing_classes = ["cat"]
    with pytest.raises(UserError, match=f"dfd_test_fails cannot be read .{type(error).__name__}"):
        dataset_dicts(dataset="dfd_test_fails")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"num_images": 1.5}, "num_images=1.5"),
        ({"num_images": "x"}, "num_images='x'"),
        ({"num_images": []}, r"num_images=\[\]"),
        ({"num_images": 1, "subset_seed": -1}, "subset_seed=-1"),
        ({"num_images": 1, "subset_seed": None}, "subset_seed=None"),
    ],
)
def test_numbers_of_a_subset_that_are_none(tmp_path, given, message):
    write_images(tmp_path)
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content()))
    with pytest.raises(UserError, match=message):
        coco_json(json=str(path), images=str(tmp_path), **given)
    for number in (1.0, "1", np.int64(1)):
        name = coco_json(json=str(path), images=str(tmp_path), num_images=number)
        assert len(dataset_dicts(dataset=name)) == 1


def test_image_on_its_side_has_the_size_in_which_it_is_loaded(read, tmp_path):
    data = change_image(width=0, height=0, file_name="turned.jpg")
    image = Image.new("RGB", (HEIGHT, WIDTH))
    exif = image.getexif()
    exif[274] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    write_turned = (tmp_path / "turned.jpg").read_bytes()
    for way in ("coco_json", "register_coco_instances"):
        name = read(way, data)
        assert (tmp_path / "turned.jpg").read_bytes() == write_turned
        assert evaluate(name)["bbox"]["AP"] == pytest.approx(100)


def test_image_without_any_size_is_refused(read, tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(UserError, match="every image needs a `width` and a `height`, or a file"):
        read("coco_json", change_image(width=0, file_name="empty.png"))


def test_finding_nothing_is_an_ap_of_0(read):
    for way in ("coco_json", "register_coco_instances", "records"):
        result = evaluate(read(way, content()), predict=False)["bbox"]
        assert result["AP"] == result["AP-cat"] == result["APs"] == 0


def with_masks(*segmentations):
    data = content()
    for annotation, segmentation in zip(data["annotations"], segmentations, strict=True):
        if segmentation is not None:
            annotation["segmentation"] = segmentation
    return data


def train_mapper(**more):
    return DatasetMapper(is_train=True, augmentations=[], image_format="BGR", **more)


def loaded(name, steps=4, **more):
    """The instances of each image as a training loader gives them."""
    loader = build_train_loader(
        dataset=name, mapper=train_mapper(**more), total_batch_size=1, seed=0,
        aspect_ratio_grouping=False,
    )  # fmt: skip
    return {b[0]["image_id"]: b[0]["instances"] for b in itertools.islice(loader, steps)}


@WAYS
@pytest.mark.parametrize("form", ["polygon", "bitmask"])
def test_objects_without_a_mask_are_left_out_of_training_on_masks(read, way, form, caplog):
    name = read(way, with_masks([POLYGON], None, [[0, 0, 40, 0, 40, 30, 0, 30]]))
    assert objects_of(name) == OBJECTS
    images = loaded(name, use_instance_mask=True, instance_mask_format=form)
    assert [len(i.gt_masks) for i in images.values()] == [1, 1]
    assert "without the mask that the mapper is to make: 1, e.g. in image 1" in caplog.text
    assert sorted(len(i) for i in loaded(name).values()) == [1, 2]
    assert "segm" not in evaluate(name, masks=True)
    mapper = train_mapper(use_instance_mask=True, instance_mask_format=form)
    labelled = list(build_test_loader(dataset=name, mapper=mapper))
    assert [len(b[0]["instances"].gt_masks) for b in labelled] == [1, 1]


@WAYS
def test_run_lengths_need_bitmasks(read, way):
    name = read(way, with_masks([POLYGON], TEXT, UNCOMPRESSED))
    with pytest.raises(UserError, match="2 masks are run lengths.*instance_mask_format=bitmask"):
        loaded(name, use_instance_mask=True, instance_mask_format="polygon")
    images = loaded(name, use_instance_mask=True, instance_mask_format="bitmask")
    assert sorted(i.gt_masks.tensor.sum().item() for i in images.values())[0] == 50
    assert "segm" in evaluate(name, masks=True)


def test_crowds_of_run_lengths_do_not_need_bitmasks(read):
    data = with_masks([POLYGON], UNCOMPRESSED, [POLYGON])
    data["annotations"][1]["iscrowd"] = 1
    images = loaded(read("coco_json", data), use_instance_mask=True)
    assert [len(i.gt_masks) for i in images.values()] == [1, 1]


def test_counts_are_decoded_as_pycocotools_does():
    rng = np.random.default_rng(0)
    for density in (0.0, 0.01, 0.5, 1.0):
        mask = np.asfortranarray(rng.random((200, 300)) < density, dtype=np.uint8)
        runs = decoded_counts(mask_util.encode(mask)["counts"])
        again = mask_util.frPyObjects({"size": [200, 300], "counts": runs.tolist()}, 200, 300)
        assert (mask_util.decode(again) == mask).all() and runs.sum() == mask.size


def with_keypoints(numbers=(5, 5, 5)):
    data = content()
    for annotation, number in zip(data["annotations"], numbers, strict=True):
        if number:
            x, y, w, h = annotation["bbox"]
            annotation["keypoints"] = [v for i in range(number) for v in (x + i, y + i, 2)]
            annotation["num_keypoints"] = number
    return data


@WAYS
def test_keypoints_are_read_and_evaluated_with_the_sigmas_given(read, way):
    name = read(way, with_keypoints())
    assert objects_of(name) == OBJECTS
    images = loaded(name, use_keypoint=True)
    assert {tuple(i.gt_keypoints.tensor.shape[1:]) for i in images.values()} == {(5, 3)}
    # A detector of boxes takes no notice.
    assert evaluate(name)["bbox"]["AP"] == pytest.approx(100)
    with pytest.raises(UserError, match=r"needs a sigma for each.*kpt_oks_sigmas to a list of 5"):
        evaluate(name, keypoints=5)
    result = evaluate(name, keypoints=5, kpt_oks_sigmas=[0.1] * 5)
    assert result["keypoints"]["AP"] == pytest.approx(100)
    with pytest.raises(UserError, match="finds 5 keypoints.*kpt_oks_sigmas|needs a sigma"):
        evaluate(name, keypoints=5, kpt_oks_sigmas=[0.1] * 4)


@WAYS
def test_objects_without_keypoints_have_none_that_is_labelled(read, way):
    name = read(way, with_keypoints((17, 0, 17)))
    visible = [i.gt_keypoints.tensor[..., 2] for i in loaded(name, use_keypoint=True).values()]
    assert sorted(int((v > 0).any(1).sum()) for v in visible) == [1, 1]
    assert sorted(len(v) for v in visible) == [1, 2]
    assert "keypoints" in evaluate(name, keypoints=17)


def test_keypoints_that_are_none_or_not_equally_many(read):
    assert "keypoints" not in evaluate(read("coco_json", content()), keypoints=17)
    name = read("coco_json", with_keypoints((5, 3, 5)))
    with pytest.raises(UserError, match="annotations of 3 and of 5 keypoints"):
        loaded(name, use_keypoint=True)
    with pytest.raises(UserError, match="annotations of 3 and of 5: "):
        evaluate(read("coco_json", with_keypoints((5, 3, 5))), keypoints=5)
    assert evaluate(name)["bbox"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    "flip",
    [T.RandomFlip(), T.RandomApply(T.RandomFlip()), T.AugmentationList([T.RandomFlip()])],
    ids=lambda flip: type(flip).__name__,
)
@pytest.mark.parametrize(
    "kind", [DatasetMapper, functools.partial(TwoSizeMapper, teacher_scale=2)], ids=["one", "two"]
)
def test_keypoints_that_would_be_flipped_need_to_know_how(read, kind, flip):
    name = read("coco_json", with_keypoints())
    for indices in (None, [0, 1]):
        mapper = kind(
            is_train=True, augmentations=[flip], image_format="BGR", use_keypoint=True,
            keypoint_hflip_indices=indices,
        )  # fmt: skip
        with pytest.raises(UserError, match="5 keypoints, which cannot be flipped.*hflip_indices"):
            build_train_loader(dataset=name, mapper=mapper, total_batch_size=1)


VOC = """<annotation><size><width>{width}</width><height>{height}</height></size>
<object><name>{name}</name><bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax>
<ymax>{ymax}</ymax></bndbox></object><object><name>dog</name><bndbox><xmin>5</xmin><ymin>5</ymin>
<xmax>30</xmax><ymax>20</ymax></bndbox></object></annotation>"""
VOC_VALUES = dict(width=40, height=30, name="cat", xmin=2, ymin=3, xmax=11, ymax=10)


@pytest.mark.parametrize(
    "values, count, notice",
    [
        (dict(), 2, None),
        (dict(width="40.0", xmin="2.0"), 2, None),
        (dict(width=0), 2, None),
        (dict(width=-40, height=""), 2, None),
        (dict(name=" cat\n"), 2, None),
        (dict(xmin="nan"), 1, "boxes dropped, not finite"),
        (dict(xmax="inf"), 1, "boxes dropped, not finite"),
        (dict(xmin=""), 1, "annotations dropped, without four box numbers"),
        (dict(xmin="left"), 1, "annotations dropped, without four box numbers"),
        (dict(xmin="1_0"), 1, "annotations dropped, without four box numbers"),
        (dict(xmin=11), 1, "boxes dropped, without area"),
        (dict(xmax="9" * 400), 1, "boxes dropped, not finite"),
    ],
)
def test_voc_has_the_same_rules(tmp_path, values, count, notice):
    root = tmp_path / "voc"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    cv2.imwrite(str(root / "JPEGImages/a.png"), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    (root / "Annotations/a.xml").write_text(VOC.format(**{**VOC_VALUES, **values}))
    (root / "ImageSets/Main/val.txt").write_text("a\n")
    name = voc_folder(root=str(root), split="val")
    assert len(objects_of(name)) == count and class_names(name) == ["cat", "dog"]
    assert dict(dataset_report(name).dropped) == ({notice: 1} if notice else {})
    assert evaluate(name)["bbox"]["AP"] == pytest.approx(100)


def test_voc_object_without_a_name_is_of_no_class(tmp_path):
    root = tmp_path / "voc"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    (root / "Annotations/a.xml").write_text(VOC.format(**{**VOC_VALUES, "name": " "}))
    (root / "JPEGImages/a.jpg").touch()
    (root / "ImageSets/Main/val.txt").write_text("a\n")
    with pytest.raises(UserError, match="1 objects have a name that is not in classes=.*''"):
        voc_folder(root=str(root), split="val")
    for classes in (["cat", "cat "], ["cat", None], [""]):
        with pytest.raises(UserError, match="voc_folder: "):
            voc_folder(root=str(root), split="val", classes=classes)

"""Names that others registered: the same counts, examples and refusals as for our own readers."""

import copy
import json
import logging
import os

import cv2
import numpy as np
import pytest
import torch
from coco_files import write_mixed_coco
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, BoxMode, Instances

from dfd.data import (
    build_evaluator,
    class_names,
    coco_json,
    dataset_dicts,
    dataset_report,
    registered_name,
)
from dfd.data.registered import content_of
from dfd.errors import UserError

NAME = "dfd_test_registered"
LOGGER = "dfd.data.registered"


@pytest.fixture
def register(tmp_path, forget):
    """Registers a small COCO data set the way that detectron2 registers COCO."""

    def register(extra=(), **change):
        paths = write_mixed_coco(tmp_path, **change)
        content = json.loads((tmp_path / "data.json").read_text())
        first = content["annotations"][0]
        for i, box in enumerate(extra):
            content["annotations"].append({**first, "id": 1000 + i, "bbox": box})
        (tmp_path / "data.json").write_text(json.dumps(content))
        register_coco_instances(NAME, {}, paths["json"], paths["images"])
        return paths

    return register


def register_records(records, classes=("a", "b")):
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).thing_classes = list(classes)


def reports(caplog):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("dataset ")]


def test_a_dataset_is_reported_once(register, caplog, tmp_path):
    paths = register()
    with caplog.at_level(logging.INFO, LOGGER):
        assert len(dataset_dicts(dataset=NAME)) == 11
        assert len(dataset_dicts(dataset=NAME, filter_empty=False)) == 12
    (report,) = reports(caplog)
    assert report.splitlines() == [
        f"dataset {NAME}",
        f"  source       {paths['json']}",
        "  images       12 of 12 listed, 1 without objects",
        "  annotations  33, of them 0 crowds",
        "  classes      3: class4 11, class17 11, class90 11",
        "  nothing dropped or clipped",
    ]
    assert str(dataset_report(NAME)) == report


def test_a_dataset_is_read_once(forget, tmp_path):
    paths, calls = write_mixed_coco(tmp_path), []
    name = coco_json(**paths)

    def read():
        calls.append(1)
        return dataset_dicts(dataset=name, filter_empty=False)

    for times in (1, 2):  # Again where the name has become another function's.
        DatasetCatalog.register(NAME, lambda: read())
        MetadataCatalog.get(NAME).thing_classes = class_names(name)
        first = dataset_dicts(dataset=NAME)
        first[0]["annotations"].clear()
        assert dataset_dicts(dataset=NAME)[0]["annotations"]
        assert dataset_report(NAME).images == 12 and build_evaluator(dataset=NAME)
        assert len(calls) == times
        DatasetCatalog.pop(NAME)


def test_degenerate_boxes_are_counted_and_left_out(register, caplog):
    paths = register(
        extra=[[5, 5, 0, 8], [5, 5, -3, 8], [60, 5, 3, 8], [float("nan"), 5, 3, 8], [20, 20, 30, 9]]
    )
    original = DatasetCatalog.get(NAME)[0]["annotations"]
    with caplog.at_level(logging.INFO, LOGGER):
        first = dataset_dicts(dataset=NAME)[0]
    assert len(original) == 8
    # The overhanging box stays as it is: detectron2's mapper clips it.
    assert [a["bbox"] for a in first["annotations"][3:]] == [[20, 20, 30, 9]]
    report = reports(caplog)[0]
    image = f"image 100 ({paths['images']}/0.png)"
    for line in (
        f"boxes dropped, without area: 2, e.g. {image}, box [5, 5, 5, 13] (x0, y0, x1, y1)",
        f"boxes dropped, outside the image: 1, e.g. {image}, box [60, 5, 63, 13]",
        f"boxes dropped, not finite: 1, e.g. {image}, box [nan, 5, nan, 13]",
        f"boxes clipped to the image: 1, e.g. {image}, box [20, 20, 50, 29]",
    ):
        assert line in report
    assert "annotations  34," in report


def test_evaluation_is_against_the_original_file(register):
    register(extra=[[5, 5, 0, 8]])
    evaluator = build_evaluator(dataset=NAME)
    dataset_dicts(dataset=NAME)
    assert len(evaluator._coco_api.anns) == 34
    assert len(build_evaluator(dataset=NAME)._coco_api.anns) == 34


def test_ap_of_a_class_is_its_own_whatever_the_order_of_the_ids(forget, tmp_path):
    """COCO's evaluation goes by category ids, Detectron2's names by those of the classes."""
    path = str(tmp_path / "image.png")
    cv2.imwrite(path, np.zeros((64, 64, 3), np.uint8))
    labels = [
        {"bbox": [4.0, 4.0, 30.0, 30.0], "bbox_mode": BoxMode.XYXY_ABS, "category_id": kind}
        for kind in (0, 1)
    ]
    record = {"file_name": path, "image_id": 1, "height": 64, "width": 64, "annotations": labels}
    register_records([record], classes=("cat", "dog"))
    MetadataCatalog.get(NAME).thing_dataset_id_to_contiguous_id = {7: 0, 3: 1}
    evaluator = build_evaluator(dataset=NAME)
    evaluator.reset()
    found = Instances((64, 64))
    found.pred_boxes = Boxes(torch.tensor([[4.0, 4.0, 30.0, 30.0]]))
    found.scores, found.pred_classes = torch.ones(1), torch.tensor([0])
    evaluator.process([record], [{"instances": found}])
    scores = evaluator.evaluate()["bbox"]
    assert scores["AP-cat"] == pytest.approx(100) and scores["AP-dog"] == 0


def test_labels_are_known_by_a_hash(forget, tmp_path):
    """Whatever of them an evaluation looks at."""
    hashes = []
    for change, folder in (
        ({}, "a"),
        ({}, "b"),
        ({"bbox": [4, 4, 30, 31]}, "a"),
        ({"category_id": 1}, "a"),
        ({"iscrowd": 1}, "a"),
        ({"area": 9.0}, "a"),
    ):
        path = str(tmp_path / folder / "image.png")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        cv2.imwrite(path, np.zeros((64, 64, 3), np.uint8))
        label = {"bbox": [4, 4, 30, 30], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0} | change
        record = {"file_name": path, "image_id": 1, "height": 64, "width": 64}
        name = f"{NAME}_{len(hashes)}"
        DatasetCatalog.register(name, lambda r=record, a=label: [r | {"annotations": [a]}])
        MetadataCatalog.get(name).thing_classes = ["cat", "dog"]
        hashes.append(content_of(name).sha256)
        DatasetCatalog.remove(name)
    assert hashes[0] == hashes[1] and len(set(hashes)) == 5


def test_records_that_the_catalog_keeps_are_not_changed(forget, tmp_path):
    (tmp_path / "x").touch()
    boxes = [
        {"bbox": [1, 2, 11, 12], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1},
        {"bbox": np.array([1, 2, 1, 12]), "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1},
        {"bbox": [1, 2, 3], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1},
        {"bbox": [9, 9, 5, 5, 45], "bbox_mode": BoxMode.XYWHA_ABS, "category_id": 0},
    ]
    # Without a size, nothing is known to be outside; without annotations, there are no objects.
    records = [
        {"file_name": str(tmp_path / "x"), "image_id": 1, "annotations": boxes},
        {"file_name": str(tmp_path / "x"), "image_id": 2},
        {"file_name": "s3://elsewhere/x", "image_id": 3, "annotations": []},
    ]
    before = copy.deepcopy(records)
    register_records(records)
    (record,) = dataset_dicts(dataset=NAME)
    assert record["annotations"] == [boxes[0], boxes[3]]
    assert str(records) == str(before)


def test_missing_images_are_fatal(register, tmp_path):
    register()
    (tmp_path / "3.png").unlink()
    with pytest.raises(
        UserError, match=rf"1 of 12 images .*{NAME} .*3\.png: set DETECTRON2_DATASETS"
    ) as e:
        dataset_dicts(dataset=NAME)
    assert "\n" not in str(e.value)


def test_unknown_classes_are_fatal(register):
    register(category_id=5)
    with pytest.raises(UserError, match=f"{NAME} cannot be read .*category_id=5") as e:
        class_names(NAME)
    assert "\n" not in str(e.value)


def test_class_ids_beyond_the_names_are_fatal(forget):
    box = {"bbox": [1, 2, 11, 12], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 2}
    register_records([{"file_name": "x", "image_id": 7, "annotations": [box]}])
    with pytest.raises(UserError, match=r"1 annotations .* outside 0 to 1, e\.g\. .* image 7 "):
        dataset_dicts(dataset=NAME)


def test_the_name_behind_a_config_node(tmp_path):
    assert registered_name("coco_2017_val") == "coco_2017_val"
    for names in ("a", ["a", "b"]):
        assert registered_name(L(get_detection_dataset_dicts)(names=names)) == "a"
    paths = write_mixed_coco(tmp_path)
    assert registered_name(L(coco_json)(**paths)) == coco_json(**paths)

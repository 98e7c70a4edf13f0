"""Reading COCO json files: what is kept, dropped, counted and refused."""

import json

import cv2
import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from dfd.data import class_names, coco_json, dataset_dicts
from dfd.data.reader import BOX_AGAIN, IMAGE_AGAIN
from dfd.errors import UserError


def annotation(i, image_id, category_id, bbox, **more):
    area = bbox[2] * bbox[3] if len(bbox) == 4 else 0
    return {"id": i, "image_id": image_id, "category_id": category_id, "bbox": bbox,
            "area": area, "iscrowd": 0, **more}  # fmt: skip


def content():
    """Four 40x30 images; the last has no objects; category ids have gaps and are not sorted."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in (7, 3, 11, 20)
        ],
        "annotations": [
            annotation(1, 3, 90, [1, 2, 10, 8]),
            annotation(2, 7, 5, [20, 10, 12, 15]),
            annotation(3, 11, 5, [0, 0, 40, 30]),
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 5, "name": "cat"}],
    }


@pytest.fixture
def write(tmp_path):
    def write_files(data, file="data.json"):
        for image in data["images"] if isinstance(data, dict) else ():
            cv2.imwrite(str(tmp_path / image["file_name"]), np.zeros((30, 40, 3), np.uint8))
        (tmp_path / file).write_text(data if isinstance(data, str) else json.dumps(data))
        return {"json": str(tmp_path / file), "images": str(tmp_path)}

    return write_files


def report(name):
    return MetadataCatalog.get(name).dfd_report


def test_category_ids_with_gaps_become_contiguous_in_ascending_order(write):
    name = coco_json(**write(content()))
    assert class_names(name) == ["cat", "dog"]
    assert MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id == {5: 0, 90: 1}
    records = dataset_dicts(dataset=name)
    assert [r["image_id"] for r in records] == [3, 7, 11]
    assert [r["annotations"][0]["category_id"] for r in records] == [1, 0, 0]
    first = records[0]["annotations"][0]
    assert BoxMode.convert(first["bbox"], first["bbox_mode"], BoxMode.XYWH_ABS) == [1, 2, 10, 8]
    assert report(name).instances == {"cat": 2, "dog": 1}
    assert report(name).images_without_objects == 1
    assert report(name).ground_truth is not None


def test_second_call_returns_the_same_name_and_callers_cannot_change_the_dataset(write):
    paths = write(content())
    name = coco_json(**paths)
    dataset_dicts(dataset=name)[0]["annotations"].clear()
    assert coco_json(**paths) == name
    assert len(dataset_dicts(dataset=name)[0]["annotations"]) == 1
    assert coco_json(**paths, num_images=2) != name


def test_degenerate_boxes_are_dropped_and_counted_and_overhanging_ones_clipped(write):
    data = content()
    data["annotations"] += [
        annotation(4, 3, 5, [5, 5, 0, 8]),
        annotation(5, 3, 5, [5, 5, -3, 8]),
        annotation(6, 3, 5, [45, 5, 3, 8]),
        annotation(7, 3, 5, [float("nan"), 5, 3, 8]),
        annotation(8, 3, 5, [30, 20, 20, 20]),
        annotation(9, 3, 5, [30, 20, 10.04, 5]),
        annotation(10, 3, 5, [1, 2, 3]),
        annotation(11, 999, 5, [1, 2, 3, 4]),
    ]
    name = coco_json(**write(data))
    boxes = [a["bbox"] for a in dataset_dicts(dataset=name)[0]["annotations"]]
    assert boxes == [[1, 2, 11, 10], [30, 20, 40, 30], [30, 20, 40, 25]]
    assert report(name).dropped == {
        "boxes dropped, without area": 2,
        "boxes dropped, outside the image": 1,
        "boxes dropped, not finite": 1,
        "boxes clipped to the image": 1,
        "annotations dropped, without four box numbers": 1,
        "annotations dropped, of an image that is not listed": 1,
    }
    assert "annotation 4" in str(report(name)) and report(name).ground_truth is None


def test_crowds_and_masks_survive(write):
    data = content()
    rle = {"size": [30, 40], "counts": [0, 600, 600]}
    data["annotations"][0]["segmentation"] = [[1, 2, 11, 2, 11, 10], [1, 2, 3, 4]]
    data["annotations"] += [
        annotation(4, 20, 5, [0, 0, 20, 30], iscrowd=1, segmentation=rle),
        annotation(5, 7, 5, [0, 0, 9, 9], segmentation=[[1, 2, 3, 4]]),
    ]
    name = coco_json(**write(data))
    records = {r["image_id"]: r for r in dataset_dicts(dataset=name, filter_empty=False)}
    crowd = records[20]["annotations"][0]
    assert crowd["iscrowd"] == 1 and isinstance(crowd["segmentation"]["counts"], bytes)
    assert records[3]["annotations"][0]["segmentation"] == [[1, 2, 11, 2, 11, 10]]
    assert len(records[7]["annotations"]) == 1
    assert report(name).crowds == 1 and report(name).annotations == 4
    # An image with nothing but a crowd has nothing to learn from.
    assert 20 not in [r["image_id"] for r in dataset_dicts(dataset=name)]


def test_missing_images_are_fatal_unless_dropped(write, tmp_path):
    paths = write(content())
    (tmp_path / "7.png").unlink()
    with pytest.raises(UserError, match=r"1 of 4 images .*7\.png.*missing_images=drop") as e:
        coco_json(**paths)
    assert "\n" not in str(e.value)
    name = coco_json(**paths, missing_images="drop")
    assert [r["image_id"] for r in dataset_dicts(dataset=name)] == [3, 11]
    assert report(name).dropped == {"images dropped, missing on disk": 1}
    assert report(name).ground_truth is None


def test_unknown_categories_are_fatal_unless_dropped(write):
    data = content()
    data["annotations"].append(annotation(4, 3, 6, [1, 1, 5, 5]))
    paths = write(data)
    with pytest.raises(UserError, match="1 annotations .*annotation 4.*unknown_classes=drop"):
        coco_json(**paths)
    name = coco_json(**paths, unknown_classes="drop")
    assert report(name).dropped == {"annotations dropped, unknown category_id": 1}
    assert report(name).annotations == 3


def test_some_of_the_classes(write):
    files = write(content())
    everything = coco_json(**files)
    name = coco_json(**files, classes=["dog"])
    assert name != everything and class_names(name) == ["dog"]
    assert MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id == {90: 0}
    # Only the test data keep images without objects.
    assert [r["image_id"] for r in dataset_dicts(dataset=name)] == [3]
    records = dataset_dicts(dataset=name, filter_empty=False)
    assert [[a["category_id"] for a in r["annotations"]] for r in records] == [[0], [], [], []]
    assert report(name).instances == {"dog": 1}
    assert report(name).dropped == {"annotations left out, of other classes": 2}
    # pycocotools is not to read the json, which has the others.
    assert report(everything).ground_truth == files["json"]
    assert report(name).ground_truth is None


def test_the_order_of_classes_is_that_of_their_ids(write):
    name = coco_json(**write(content()), classes=["dog", "cat"])
    assert class_names(name) == ["cat", "dog"]
    assert [r["annotations"][0]["category_id"] for r in dataset_dicts(dataset=name)] == [1, 0, 0]


def test_classes_that_the_json_does_not_have_are_refused(write):
    files = write(content())
    with pytest.raises(UserError, match="has no category 'bird': name some of cat, dog"):
        coco_json(**files, classes=["dog", "bird"])
    with pytest.raises(UserError, match="is to have no class: name some of cat, dog"):
        coco_json(**files, classes=[])
    with pytest.raises(UserError, match="give a list of them"):
        coco_json(**files, classes="dog")
    data = content()
    data["annotations"].append(annotation(4, 3, 77, [1, 2, 3, 4]))
    with pytest.raises(UserError, match="1 annotations have a category_id that is not in"):
        coco_json(**write(data, "unknown.json"), classes=["dog"])


def test_subsets_of_one_seed_are_nested_and_have_objects(write):
    data = content()
    data["images"] = [
        {"id": i, "file_name": "x.png", "width": 40, "height": 30} for i in range(1, 61)
    ]
    data["annotations"] = [annotation(i, i, 5, [1, 1, 5, 5]) for i in range(1, 41)]
    paths = write(data)

    def ids(n, seed=0):
        name = coco_json(**paths, num_images=n, subset_seed=seed)
        assert report(name).ground_truth is None
        return [r["image_id"] for r in dataset_dicts(dataset=name, filter_empty=False)]

    assert len(ids(10)) == 10 and ids(10) == sorted(ids(10))
    assert set(ids(10)) < set(ids(20)) < set(ids(40)) == set(range(1, 41))
    assert ids(10) != ids(10, seed=1)
    for n in (0, 41):
        with pytest.raises(UserError, match=f"num_images={n}.*40 images with objects"):
            ids(n)


def _edited(key, value):
    data = content()
    data[key] = value
    return data


@pytest.mark.parametrize(
    "data, message",
    [
        ("{not json", "is not JSON"),
        ("[1, 2]", "no list `images`"),
        ({k: v for k, v in content().items() if k != "categories"}, "no list `categories`"),
        (_edited("annotations", None), "no list `annotations`"),
        (_edited("images", []), "holds no images"),
        (_edited("categories", []), "`categories` is empty"),
        (_edited("images", content()["images"] + content()["images"][:1]), "id 7 occurs twice"),
        (_edited("images", [{"id": 1, "file_name": "1.png"}]), "every image needs"),
        (_edited("categories", [{"id": 5, "name": "a"}, {"id": 5, "name": "b"}]), "same id"),
    ],
)
def test_broken_json_is_refused_in_one_line(write, data, message):
    if message == "holds no images":
        data["annotations"] = []
    if isinstance(data, str):
        paths = write(data)
    else:
        valid = [i for i in data["images"] if "width" in i]
        write({**content(), "images": valid}, file="other.json")
        paths = write({**data, "images": []}) and write(json.dumps(data))
    with pytest.raises(UserError, match=message) as e:
        coco_json(**paths)
    assert "\n" not in str(e.value) and paths["json"] in str(e.value)


def test_missing_or_empty_paths_name_the_path(write, tmp_path):
    paths = write(content())
    with pytest.raises(UserError, match="nowhere.json does not exist"):
        coco_json(json=str(tmp_path / "nowhere.json"), images=str(tmp_path))
    with pytest.raises(UserError, match="nowhere does not exist"):
        coco_json(json=paths["json"], images=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="json is empty: set dataloader.train.dataset.json"):
        coco_json(json="", images="")
    with pytest.raises(UserError, match="missing_images is 'skip'; it must be one of error, drop"):
        coco_json(**paths, missing_images="skip")


def test_dataset_without_any_object_is_refused_for_training_only(write):
    name = coco_json(**write(_edited("annotations", [])))
    assert len(dataset_dicts(dataset=name, filter_empty=False)) == 4
    with pytest.raises(UserError, match="none of them has an object"):
        dataset_dicts(dataset=name)


def test_what_is_given_twice_is_told_and_kept(write, tmp_path):
    data = content()
    data["annotations"].append(data["annotations"][0] | {"id": 9})
    data["images"].append(data["images"][0] | {"id": 99})
    files = write(data)
    name = coco_json(**files)
    told = report(name)
    assert told.dropped == {IMAGE_AGAIN: 1, BOX_AGAIN: 1}
    assert told.examples[BOX_AGAIN] == f"[1, 2, 11, 10] of {tmp_path / '3.png'}"
    assert told.examples[IMAGE_AGAIN] == f"{tmp_path / '7.png'} as 7 and as 99"
    assert told.annotations == 4 and told.images == 5
    assert told.ground_truth == files["json"]  # Its numbers stay the official ones.


def test_boxes_in_fractions_of_the_image_are_refused(write):
    data = content()
    for entry in data["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["bbox"] = [x / 40, y / 30, w / 40, h / 30]
    with pytest.raises(UserError, match="first pixel of its image, e.g. .*in pixels, not in frac"):
        coco_json(**write(data))

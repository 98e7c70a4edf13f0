"""The generated dataset: deterministic, complete or absent, and with boxes that fit."""

import json
import os

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest

from dfd.data import class_names, dataset_dicts
from dfd.demo import SHAPE_CLASSES, drawing, generated_shapes, shapes
from dfd.demo.drawing import draw_image
from dfd.errors import UserError

SPEC = dict(num_train=6, num_val=4, image_size=64, seed=3)


def tree(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_same_seed_gives_the_same_files_and_another_seed_others(tmp_path):
    for name in ("one", "two"):
        generated_shapes(root=str(tmp_path / name), split="train", **SPEC)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert len(tree(tmp_path / "one")) == 6 + 4 + 3
    a, _ = draw_image(seed=0, split="train", index=0, size=64)
    for other in (dict(seed=1), dict(split="val"), dict(index=1)):
        b, _ = draw_image(**{**dict(seed=0, split="train", index=0, size=64), **other})
        assert not np.array_equal(a, b)


def test_both_splits_load_with_all_classes_and_every_image_has_an_object(tmp_path):
    for split, number in (("train", 6), ("val", 4)):
        name = generated_shapes(root=str(tmp_path / "shapes"), split=split, **SPEC)
        assert class_names(name) == list(SHAPE_CLASSES)
        records = dataset_dicts(dataset=name, filter_empty=True)
        assert len(records) == number
        assert cv2.imread(records[0]["file_name"]).shape == (64, 64, 3)
    half = generated_shapes(root=str(tmp_path / "shapes"), split="train", **SPEC, num_images=3)
    assert len(dataset_dicts(dataset=half)) == 3


def test_some_of_the_classes(tmp_path):
    root, chosen = str(tmp_path / "shapes"), ["star", "circle"]
    name = generated_shapes(root=root, split="train", **SPEC, classes=chosen)
    assert class_names(name) == chosen
    found = {a["category_id"] for r in dataset_dicts(dataset=name) for a in r["annotations"]}
    assert found == {0, 1}
    with pytest.raises(UserError, match="was made with"):
        generated_shapes(root=root, split="train", **SPEC)
    for wrong in ([], ["star", "star"], ["hexagon"]):
        with pytest.raises(UserError, match="must be different ones of circle, ring"):
            generated_shapes(root=str(tmp_path / "new"), split="train", **SPEC, classes=wrong)
    # All of them in their order is what a folder is that names none.
    generated_shapes(root=str(tmp_path / "all"), split="train", **SPEC)
    generated_shapes(root=str(tmp_path / "all"), split="val", **SPEC, classes=SHAPE_CLASSES)


def test_boxes_and_areas_agree_with_the_polygons_and_lie_in_the_image():
    seen = set()
    for index in range(60):
        _, objects = draw_image(seed=0, split="val", index=index, size=128)
        assert objects
        for item in objects:
            seen.add(item["category_id"])
            x, y, w, h = item["bbox"]
            assert min(x, y) >= 0 and max(x + w, y + h) <= 128.01 and min(w, h) > 2
            points = np.array(item["segmentation"][0]).reshape(-1, 2)
            np.testing.assert_allclose(points.min(0), [x, y], atol=0.02)
            np.testing.assert_allclose(points.max(0), [x + w, y + h], atol=0.02)
            mask = mask_util.decode(mask_util.frPyObjects(item["segmentation"], 128, 128))
            assert abs(mask.sum() - item["area"]) < 0.15 * item["area"] + 25
    assert seen == set(range(1, len(SHAPE_CLASSES) + 1))


def test_object_is_painted_where_its_polygon_says(monkeypatch):
    """With a flat background and a flat fill, the pixels that differ are those of the polygon."""
    monkeypatch.setattr(drawing, "_texture", lambda rng, size, detail: np.zeros((size, size, 3)))
    monkeypatch.setattr(drawing, "_light", lambda rng, canvas: canvas)
    monkeypatch.setattr(drawing, "_distractor", lambda rng: np.zeros((3, 2)))
    monkeypatch.setattr(
        drawing, "_paint", lambda rng, canvas, mask, radius: canvas.__setitem__(mask > 127, 255.0)
    )
    for index in range(20):
        image, objects = draw_image(seed=1, split="train", index=index, size=128)
        expected = np.zeros((128, 128), bool)
        for item in objects:
            rle = mask_util.frPyObjects(item["segmentation"], 128, 128)
            expected |= mask_util.decode(rle).any(axis=2)
        painted = image[..., 0] > 0
        assert (painted & expected).sum() > 0.9 * (painted | expected).sum()


def test_folder_made_with_other_arguments_is_refused_and_left_alone(tmp_path):
    root = tmp_path / "shapes"
    generated_shapes(root=str(root), split="train", **SPEC)
    before = tree(root)
    with pytest.raises(UserError, match="was made with .*choose another root") as e:
        generated_shapes(root=str(root), split="train", **{**SPEC, "seed": 4})
    assert "\n" not in str(e.value) and tree(root) == before

    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "me.jpg").write_bytes(b"1")
    with pytest.raises(UserError, match="is not a generated dataset"):
        generated_shapes(root=str(foreign), split="train", **SPEC)
    assert os.listdir(foreign) == ["me.jpg"]


def test_existing_folder_is_reused_without_drawing(tmp_path, monkeypatch):
    root = str(tmp_path / "shapes")
    name = generated_shapes(root=root, split="train", **SPEC)

    def fail(**_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(shapes, "draw_image", fail)
    assert generated_shapes(root=root, split="train", **SPEC) == name


def test_killed_run_leaves_nothing_behind(tmp_path, monkeypatch):
    real = draw_image

    def stop(*, split, index, **kwargs):
        if (split, index) == ("val", 2):
            raise KeyboardInterrupt
        return real(split=split, index=index, **kwargs)

    monkeypatch.setattr(shapes, "draw_image", stop)
    with pytest.raises(KeyboardInterrupt):
        generated_shapes(root=str(tmp_path / "shapes"), split="train", **SPEC)
    assert os.listdir(tmp_path) == []


def test_process_that_comes_second_takes_the_folder_of_the_first(tmp_path, monkeypatch):
    root = tmp_path / "shapes"
    real = os.rename

    def late(source, target):
        monkeypatch.setattr(os, "rename", real)
        generated_shapes(root=str(root), split="train", **SPEC)
        real(source, target)

    monkeypatch.setattr(os, "rename", late)
    generated_shapes(root=str(root), split="val", **SPEC)
    assert json.loads((root / "spec.json").read_text())["num_val"] == 4
    assert os.listdir(tmp_path) == ["shapes"]


def test_bad_arguments_are_named(tmp_path):
    for key, value in (("num_train", 0), ("image_size", 16), ("seed", -1), ("clutter", 1.5)):
        with pytest.raises(UserError, match=f"{key} is {value}; it must be a"):
            generated_shapes(root=str(tmp_path / "s"), split="train", **{**SPEC, key: value})
    with pytest.raises(UserError, match="root is empty"):
        generated_shapes(root="", split="train", **SPEC)
    with pytest.raises(UserError, match="split is 'test'; it must be one of train, val"):
        generated_shapes(root=str(tmp_path / "s"), split="test", **SPEC)


def test_less_clutter_means_larger_objects_that_overlap_less():
    def areas(clutter):
        images = [
            draw_image(seed=0, split="train", index=i, size=64, clutter=clutter)[1]
            for i in range(40)
        ]
        return [a["bbox"][2] * a["bbox"][3] for objects in images for a in objects]

    assert min(areas(0.0)) > 2 * min(areas(1.0))

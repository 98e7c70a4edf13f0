"""The loaders see the same images for the same seed; the evaluator measures what they load."""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import cv2
import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from coco_files import IDS, write_mixed_coco
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from omegaconf import OmegaConf

from dfd.data import (
    build_evaluator,
    build_test_loader,
    build_train_loader,
    class_names,
    coco_json,
    dataset_dicts,
    image_folder,
    skip_batches,
    voc_folder,
)
from dfd.demo import generated_shapes
from dfd.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "common" / "data"


def train_mapper():
    flips = [T.RandomFlip(horizontal=True), T.RandomBrightness(0.5, 1.5)]
    return DatasetMapper(is_train=True, augmentations=flips, image_format="BGR")


def test_mapper():
    return DatasetMapper(is_train=False, augmentations=[], image_format="BGR")


test_mapper.__test__ = False


def batches(name, steps=8, disturb=False, **more):
    loader = iter(
        build_train_loader(dataset=name, mapper=train_mapper(), total_batch_size=3, **more)
    )
    result = []
    for _ in range(steps):
        result.append([(d["image_id"], d["image"].float().sum().item()) for d in next(loader)])
        if disturb:
            np.random.rand(5), torch.rand(3)
    return result


@pytest.fixture
def servers_start_processes():
    """As in Python 3.14 by default."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers never were forked")
def test_workers_are_forked_in_every_python(tmp_path, servers_start_processes):
    name = coco_json(**write_mixed_coco(tmp_path))
    # Which another process than a forked one cannot have.
    mapper = lambda record: {"image_id": record["image_id"]}  # noqa: E731
    trained = build_train_loader(dataset=name, mapper=mapper, total_batch_size=1, num_workers=1)
    tested = build_test_loader(dataset=name, mapper=mapper, num_workers=1)
    assert next(iter(trained)) and next(iter(tested))


@pytest.mark.parametrize("grouping", [True, False])
def test_same_seed_gives_the_same_augmented_images_whatever_else_draws(tmp_path, grouping):
    name = coco_json(**write_mixed_coco(tmp_path))
    first = batches(name, seed=5, aspect_ratio_grouping=grouping)
    np.random.seed(1)
    assert batches(name, seed=5, disturb=True, aspect_ratio_grouping=grouping) == first
    assert batches(name, seed=5, num_workers=2, aspect_ratio_grouping=grouping) == first
    assert batches(name, seed=6, aspect_ratio_grouping=grouping) != first
    # Augmentation differs from epoch to epoch: one image does not look the same each time.
    looks = {}
    for image_id, value in sum(first, []):
        looks.setdefault(image_id, set()).add(value)
    assert max(len(v) for v in looks.values()) > 1


def test_another_seed_augments_the_same_image_differently(tmp_path):
    name = coco_json(
        **write_mixed_coco(tmp_path, number=2)
    )  # One image with objects: no order to vary.
    assert batches(name, seed=5) == batches(name, seed=5) != batches(name, seed=6)


def test_loading_leaves_the_random_numbers_of_the_process_alone(tmp_path):
    name = coco_json(**write_mixed_coco(tmp_path))
    loader = iter(
        build_train_loader(dataset=name, mapper=train_mapper(), total_batch_size=2, seed=0)
    )
    next(loader)
    np.random.seed(3), torch.manual_seed(3)
    expected = np.random.rand(), torch.rand(())
    np.random.seed(3), torch.manual_seed(3)
    next(loader)
    assert (np.random.rand(), torch.rand(())) == expected


def test_aspect_ratio_grouping_does_not_mix_wide_and_tall_images(tmp_path):
    name = coco_json(**write_mixed_coco(tmp_path))
    loader = iter(
        build_train_loader(dataset=name, mapper=train_mapper(), total_batch_size=4, seed=0)
    )
    for _ in range(5):
        assert len({d["width"] > d["height"] for d in next(loader)}) == 1


def test_what_takes_the_place_of_a_skipped_image_is_as_wide(tmp_path):
    """Else one tall image would pad a whole batch of wide ones."""
    inner = train_mapper()
    name = coco_json(**write_mixed_coco(tmp_path))
    given = dict(dataset=name, total_batch_size=4, seed=0)
    loader = build_train_loader(
        mapper=lambda d: None if d["image_id"] % 3 == 0 else inner(d), **given
    )
    for _, batch in zip(range(8), loader, strict=False):
        assert len({d["width"] > d["height"] for d in batch}) == 1
    # Rather another kind than no image at all.
    wide = build_train_loader(
        mapper=lambda d: inner(d) if d["width"] > d["height"] else None, **given
    )
    for _, batch in zip(range(8), wide, strict=False):
        assert all(d["width"] > d["height"] for d in batch)


def test_a_test_mapper_may_leave_no_image_out(tmp_path):
    """Detectron2 would take another one instead, and test that twice."""
    name = coco_json(**write_mixed_coco(tmp_path))
    inner = train_mapper()
    loader = build_test_loader(
        dataset=name, mapper=lambda d: None if d["image_id"] == 100 else inner(d)
    )
    with pytest.raises(UserError, match="the test data returned None for .*: it must give every"):
        list(loader)


@pytest.mark.parametrize("seed", [-1, None])
def test_without_a_seed_two_runs_differ(tmp_path, seed):
    name = coco_json(**write_mixed_coco(tmp_path))
    np.random.seed(None)
    assert batches(name, seed=seed) != batches(name, seed=seed)


def test_images_without_objects_are_tested_but_not_trained_on(tmp_path):
    name = coco_json(**write_mixed_coco(tmp_path))
    tested = [d[0]["image_id"] for d in build_test_loader(dataset=name, mapper=test_mapper())]
    assert tested == list(range(100, 112))
    trained = {image_id for batch in batches(name, steps=12, seed=0) for image_id, _ in batch}
    assert trained == set(range(100, 111))
    with_empty = batches(name, steps=12, seed=0, filter_empty=False)
    assert 111 in {image_id for batch in with_empty for image_id, _ in batch}


def test_image_that_cannot_be_read_is_named(tmp_path):
    name = coco_json(**write_mixed_coco(tmp_path, number=3))
    (tmp_path / "1.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"cannot load image .*1\.png") as e:
        batches(name, seed=0)
    assert "\n" not in str(e.value)
    cv2.imwrite(str(tmp_path / "1.png"), np.zeros((5, 5, 3), np.uint8))
    with pytest.raises(UserError, match=r"cannot load image .*1\.png") as e:
        list(build_test_loader(dataset=name, mapper=test_mapper()))
    assert "\n" not in str(e.value)


def test_mapper_that_skips_an_image_gets_the_next_one(tmp_path):
    name = coco_json(**write_mixed_coco(tmp_path))
    inner = train_mapper()
    loader = build_train_loader(
        dataset=name,
        mapper=lambda d: None if d["image_id"] == 100 else inner(d),
        total_batch_size=1,
        seed=0,
    )
    iterator = iter(loader)
    seen = {next(iterator)[0]["image_id"] for _ in range(30)}
    assert seen == set(range(101, 111))
    broken = build_train_loader(dataset=name, mapper=lambda d: None, total_batch_size=1, seed=0)
    with pytest.raises(UserError, match="None for every image"):
        next(iter(broken))


def test_unknown_dataset_and_bad_batch_size_are_named(tmp_path):
    with pytest.raises(UserError, match="'no_such' is not registered"):
        dataset_dicts(dataset="no_such")
    with pytest.raises(UserError, match="'no_such' is not registered"):
        class_names("no_such")
    name = coco_json(**write_mixed_coco(tmp_path))
    with pytest.raises(UserError, match="total_batch_size=0"):
        build_train_loader(dataset=name, mapper=train_mapper(), total_batch_size=0)
    assert class_names("coco_2017_val")[:2] == ["person", "bicycle"]
    if not os.path.exists(MetadataCatalog.get("coco_2017_val").json_file):
        with pytest.raises(UserError, match="set DETECTRON2_DATASETS"):
            dataset_dicts(dataset="coco_2017_val")
        with pytest.raises(UserError, match="set DETECTRON2_DATASETS"):
            build_evaluator(dataset="coco_2017_val")


def perfect(name, evaluator, shift=0.0):
    """Metrics of predictions equal to the ground truth that the loader holds."""
    evaluator.reset()
    for record in dataset_dicts(dataset=name, filter_empty=False):
        objects = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
        output = Instances((record["height"], record["width"]))
        output.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4) + shift)
        output.scores = torch.ones(len(objects))
        output.pred_classes = torch.tensor([a["category_id"] for a in objects], dtype=torch.long)
        evaluator.process([record], [{"instances": output}])
    return evaluator.evaluate()["bbox"]


def assert_perfect(name, evaluator, classes):
    result = perfect(name, evaluator)
    assert result["AP"] == pytest.approx(100)
    for c in classes:
        assert result[f"AP-{c}"] == pytest.approx(100)
    assert perfect(name, evaluator, shift=2.0)["AP"] < 90


def test_unchanged_coco_json_is_evaluated_against_the_original_file(tmp_path):
    paths = write_mixed_coco(tmp_path)
    name = coco_json(**paths)
    assert MetadataCatalog.get(name).json_file == paths["json"]
    assert_perfect(name, build_evaluator(dataset=name), [f"class{i}" for i in IDS])


@pytest.mark.parametrize(
    "change",
    [
        {"bbox": [5, 5, 0, 3]},
        {"bbox": [20, 3, 40, 12]},
        {"category_id": 5},
        # pycocotools would never match an annotation with id 0, and fail without an area.
        {"id": 0},
        {"area": None},
    ],
)
def test_changed_coco_data_is_evaluated_against_what_the_loader_holds(tmp_path, change):
    paths = write_mixed_coco(tmp_path, **change)
    if change == {"area": None}:
        content = json.loads((tmp_path / "data.json").read_text())
        del content["annotations"][0]["area"]
        (tmp_path / "data.json").write_text(json.dumps(content))
    name = coco_json(**paths, unknown_classes="drop")
    before = sorted(os.listdir(tmp_path))
    assert_perfect(name, build_evaluator(dataset=name), [f"class{i}" for i in IDS])
    assert sorted(os.listdir(tmp_path)) == before


def test_subset_is_evaluated_alone_and_a_stale_file_is_replaced(tmp_path):
    paths = write_mixed_coco(tmp_path)
    name = coco_json(**paths, num_images=4)
    out = tmp_path / "out"
    out.mkdir()
    truth = out / f"{name}_ground_truth.json"
    truth.write_text("stale")
    evaluator = build_evaluator(dataset=name, output_dir=str(out))
    assert os.listdir(out) == [truth.name]
    assert len(json.loads(truth.read_text())["images"]) == 4
    assert_perfect(name, evaluator, [f"class{i}" for i in IDS])
    # The areas decide what is small, so those of the source are kept: not one is a box area.
    areas = {a["area"] for a in json.loads(truth.read_text())["annotations"]}
    assert areas == {50, 51, 52}
    # Metadata is unchanged, so nothing that reads it later takes the subset's file for a cache.
    assert not hasattr(MetadataCatalog.get(name), "json_file")


def test_ground_truth_cached_by_another_evaluator_is_not_used(tmp_path):
    paths = write_mixed_coco(tmp_path)
    name = coco_json(**paths, num_images=5)
    MetadataCatalog.get(name).json_file = paths["json"]  # As detectron2's evaluator does.
    entries = set(MetadataCatalog.list())
    assert perfect(name, build_evaluator(dataset=name))["AP"] == pytest.approx(100)
    assert set(MetadataCatalog.list()) == entries


def test_crowd_is_neither_an_object_nor_a_false_positive(tmp_path):
    rle = {"size": [48, 32], "counts": [0, 48 * 32]}
    paths = write_mixed_coco(tmp_path, iscrowd=1, segmentation=rle, bbox=[0, 0, 32, 48])
    name = coco_json(**paths, num_images=11)
    evaluator = build_evaluator(dataset=name, output_dir=str(tmp_path / "out"))
    truth = json.loads((tmp_path / "out" / f"{name}_ground_truth.json").read_text())
    assert [a["iscrowd"] for a in truth["annotations"][:2]] == [1, 0]
    assert_perfect(name, evaluator, [f"class{i}" for i in IDS])


def test_voc_and_shapes_are_evaluated_exactly(tmp_path):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / "voc" / folder).mkdir(parents=True)
    boxes = {"cat": (1, 1, 20, 25), "dog": (12, 4, 40, 30)}
    objects = "".join(
        f"<object><name>{n}</name><bndbox><xmin>{b[0]}</xmin><ymin>{b[1]}</ymin>"
        f"<xmax>{b[2]}</xmax><ymax>{b[3]}</ymax></bndbox></object>"
        for n, b in boxes.items()
    )
    size = "<size><width>40</width><height>30</height></size>"
    for stem in ("a", "b"):
        (tmp_path / f"voc/Annotations/{stem}.xml").write_text(f"<a>{size}{objects}</a>")
        (tmp_path / f"voc/JPEGImages/{stem}.jpg").write_bytes(b"")
    (tmp_path / "voc/ImageSets/Main/val.txt").write_text("a\nb\n")
    name = voc_folder(root=str(tmp_path / "voc"), split="val")
    assert_perfect(name, build_evaluator(dataset=name), ["cat", "dog"])

    spec = dict(root=str(tmp_path / "shapes"), num_train=1, num_val=5, image_size=64, seed=0)
    name = generated_shapes(split="val", **spec)
    assert perfect(name, build_evaluator(dataset=name))["AP"] == pytest.approx(100)


def test_dataset_registered_elsewhere_is_converted_afresh(tmp_path):
    box = {"bbox": [1, 2, 11, 12], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    record = {"file_name": str(tmp_path / "x"), "image_id": "x", "width": 40, "height": 30,
              "annotations": [box]}  # fmt: skip
    (tmp_path / "x").touch()
    DatasetCatalog.register("dfd_test_elsewhere", lambda: [record])
    try:
        MetadataCatalog.get("dfd_test_elsewhere").thing_classes = ["a", "b"]
        evaluator = build_evaluator(dataset="dfd_test_elsewhere")
        assert perfect("dfd_test_elsewhere", evaluator)["AP-a"] == pytest.approx(100)
    finally:
        DatasetCatalog.pop("dfd_test_elsewhere")
        MetadataCatalog.pop("dfd_test_elsewhere")


def full_config(name, *overrides):
    cfg = OmegaConf.create({"train": {"seed": 7}}, flags={"allow_objects": True})
    cfg.dataloader = LazyConfig.load(str(CONFIGS / f"{name}.py")).dataloader
    cfg.dataloader.train.num_workers = cfg.dataloader.test.num_workers = 0
    return LazyConfig.apply_overrides(cfg, ["dataloader.train.total_batch_size=2", *overrides])


@pytest.mark.parametrize("name", ["coco_json", "voc", "shapes"])
def test_config_without_a_path_says_which_setting_to_fill(name):
    cfg = full_config(name)
    for part in (cfg.dataloader.train, cfg.dataloader.test, cfg.dataloader.evaluator):
        with pytest.raises(UserError, match=r"(json|root) is empty: set dataloader\.train\."):
            instantiate(part)


def test_shapes_config_needs_its_root_once_and_its_seed_is_that_of_the_run(tmp_path):
    root = f"dataloader.train.dataset.root={tmp_path / 'shapes'}"
    small = [f"dataloader.train.dataset.{k}" for k in ("num_train=8", "num_val=3", "image_size=64")]

    def first_batch(seed):
        cfg = full_config("shapes", root, *small, f"train.seed={seed}")
        batch = next(iter(instantiate(cfg.dataloader.train)))
        return cfg, [(d["image_id"], d["image"].sum().item()) for d in batch]

    cfg, batch = first_batch(1)
    assert first_batch(1)[1] == batch != first_batch(2)[1]
    assert [d[0]["image"].shape for d in instantiate(cfg.dataloader.test)] == [(3, 64, 64)] * 3
    evaluator = instantiate(cfg.dataloader.evaluator)
    name = instantiate(cfg.dataloader.test.dataset)
    assert perfect(name, evaluator)["AP"] == pytest.approx(100)


def test_coco_config_takes_a_subset_and_the_test_split_stays_whole(tmp_path):
    paths = write_mixed_coco(tmp_path)
    settings = [f"dataloader.{s}.dataset.{k}={v}" for s in ("train", "test")
                for k, v in paths.items()]  # fmt: skip
    cfg = full_config("coco_json", *settings, "dataloader.train.dataset.num_images=3")
    cfg.dataloader.train.mapper.image_format = "RGB"
    iterator = iter(instantiate(cfg.dataloader.train))
    assert len({d["image_id"] for _ in range(8) for d in next(iterator)}) == 3
    assert cfg.dataloader.test.mapper.image_format == "RGB"
    assert len(list(instantiate(cfg.dataloader.test))) == 12


def test_config_takes_a_registered_name_in_place_of_a_reader(tmp_path):
    name = coco_json(**write_mixed_coco(tmp_path))
    cfg = full_config(
        "coco_json", f"dataloader.train.dataset={name}", f"dataloader.test.dataset={name}"
    )
    assert len(next(iter(instantiate(cfg.dataloader.train)))) == 2
    assert len(list(instantiate(cfg.dataloader.test))) == 12
    evaluator = instantiate(cfg.dataloader.evaluator)
    assert perfect(name, evaluator)["AP"] == pytest.approx(100)


def test_saved_config_builds_the_same_loader(tmp_path):
    root = f"dataloader.train.dataset.root={tmp_path / 'shapes'}"
    small = [f"dataloader.train.dataset.{k}" for k in ("num_train=4", "num_val=2", "image_size=64")]
    cfg = full_config("shapes", root, *small)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    again = LazyConfig.load(str(tmp_path / "config.yaml"))
    a, b = (next(iter(instantiate(c.dataloader.train))) for c in (cfg, again))
    assert [d["image_id"] for d in a] == [d["image_id"] for d in b]
    assert len(list(instantiate(again.dataloader.test))) == 2


def test_voc_config_passes_root_and_classes_on_to_the_test_split(tmp_path):
    cfg = full_config(
        "voc", f"dataloader.train.dataset.root={tmp_path}",
        "dataloader.train.dataset.classes=[dog,cat]",
    )  # fmt: skip
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "Annotations/a.xml").write_text(
        "<a><size><width>40</width><height>30</height></size><object><name>cat</name><bndbox>"
        "<xmin>2</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></a>"
    )
    cv2.imwrite(str(tmp_path / "JPEGImages/a.jpg"), np.zeros((30, 40, 3), np.uint8))
    (tmp_path / "ImageSets/Main/val.txt").write_text("a\n")
    name = instantiate(cfg.dataloader.test.dataset)
    assert class_names(name) == ["dog", "cat"]
    assert len(list(instantiate(cfg.dataloader.test))) == 1
    assert perfect(name, instantiate(cfg.dataloader.evaluator))["AP-cat"] == pytest.approx(100)


def mixed_batches(tmp_path, steps=4, skip=0, workers=0, **more):
    name = coco_json(**write_mixed_coco(tmp_path))
    loader = build_train_loader(
        dataset=name,
        mapper=train_mapper(),
        total_batch_size=2,
        num_workers=workers,
        seed=3,
        **{"unlabelled": name, "unlabelled_batch_size": 3} | more,
    )
    assert skip_batches(loader, skip)
    stream = iter(loader)
    return [next(stream) for _ in range(steps)]


def shown(batches):
    return [[(d["image_id"], d["image"].float().sum().item()) for d in batch] for batch in batches]


def test_unlabelled_images_follow_the_labelled_ones_of_a_batch(tmp_path):
    found = mixed_batches(tmp_path)
    for batch in found:
        assert [d.get("unlabelled", False) for d in batch] == [False] * 2 + [True] * 3
        assert ["instances" in d for d in batch] == [True] * 2 + [False] * 3
    alone = mixed_batches(tmp_path, unlabelled=None, unlabelled_batch_size=0)
    assert shown(alone) == [batch[:2] for batch in shown(found)]
    # Images without an object are among them.
    name = coco_json(**write_mixed_coco(tmp_path))
    everything = {r["image_id"] for r in dataset_dicts(dataset=name, filter_empty=False)}
    labelled = {r["image_id"] for r in dataset_dicts(dataset=name)}
    assert labelled < everything
    many = mixed_batches(tmp_path, steps=12)
    assert {d["image_id"] for batch in many for d in batch[2:]} == everything


@pytest.mark.parametrize("workers", [0, 1])
def test_mixed_batches_continue_where_they_were(tmp_path, workers):
    straight = shown(mixed_batches(tmp_path, steps=6))
    assert shown(mixed_batches(tmp_path, steps=3, skip=3, workers=workers)) == straight[3:]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"unlabelled": None}, "unlabelled=None and unlabelled_batch_size=3: set both"),
        ({"unlabelled_batch_size": 0}, "and unlabelled_batch_size=0: set both"),
        ({"unlabelled_batch_size": -1}, "unlabelled_batch_size=-1 must be a positive multiple"),
        ({"unlabelled": "absent"}, "'absent' is not registered"),
    ],
)
def test_bad_settings_of_unlabelled_images_are_told(tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        mixed_batches(tmp_path, **more)


def test_a_folder_of_images_is_a_dataset_without_labels(tmp_path):
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name, size in (("b.png", (30, 20)), ("more/a.jpg", (20, 40))):
        cv2.imwrite(str(tmp_path / "photos" / name), np.zeros((size[1], size[0], 3), np.uint8))
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    name = image_folder(images=str(tmp_path / "photos"))
    assert image_folder(images=str(tmp_path / "photos")) == name
    records = dataset_dicts(dataset=name, filter_empty=False)
    assert [(Path(r["file_name"]).name, r["width"], r["height"]) for r in records] == [
        ("b.png", 30, 20),
        ("a.jpg", 20, 40),
    ]
    batches = mixed_batches(tmp_path, unlabelled=name, steps=2)
    assert {Path(d["file_name"]).name for b in batches for d in b[2:]} == {"b.png", "a.jpg"}
    (tmp_path / "photos" / "broken.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    for folder, message in (("photos2", "does not exist"), ("empty", "holds no images")):
        with pytest.raises(UserError, match=message):
            image_folder(images=str(tmp_path / folder))
    (tmp_path / "photos").rename(tmp_path / "other")
    with pytest.raises(UserError, match="broken.png"):
        image_folder(images=str(tmp_path / "other"))

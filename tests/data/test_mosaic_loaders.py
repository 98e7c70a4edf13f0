"""Mosaics in the training loader: what they are depends on seed, place and batch alone."""

import itertools
import pickle
from pathlib import Path

import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from coco_files import write_mixed_coco
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetMapper
from detectron2.utils import comm
from omegaconf import OmegaConf
from plain import PlainDetector

from dfd import DFDHead, DistilledDetector, FrozenTeacher, UserError
from dfd.data import (
    MosaicMapper,
    build_test_loader,
    build_train_loader,
    coco_json,
    skip_batches,
)
from dfd.distill.contract import UNLABELLED
from dfd.distill.real_pixels import image_area
from dfd.losses import MimicLoss

SETTINGS = dict(size=64, sizes=[32, 64, 96], size_period=3, off_from_batch=8)
STEPS = 12


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return coco_json(**write_mixed_coco(tmp_path_factory.mktemp("coco")))


def loader_of(name, settings=SETTINGS, **more):
    more = dict(total_batch_size=4, seed=7, aspect_ratio_grouping=False) | more
    return build_train_loader(dataset=name, mapper=MosaicMapper(**settings), **more)


def content(item):
    """All that is in an item, to the bit."""
    instances = item["instances"]
    boxes, classes = instances.gt_boxes.tensor.tolist(), instances.gt_classes.tolist()
    image = (tuple(item["image"].shape), item["image"].numpy().tobytes())
    return (item["image_id"], image, item["valid"].numpy().tobytes(), boxes, classes)


def batches(loader, steps=STEPS):
    iterator = iter(loader)
    return [[content(item) for item in next(iterator)] for _ in range(steps)]


@pytest.fixture(scope="module")
def expected(name):
    return batches(loader_of(name))


def test_mixup_of_labelled_images_beside_some_without_labels(name):
    """Of these nothing is mixed, and none has to have an object."""
    more = dict(unlabelled=name, unlabelled_batch_size=2)
    (batch,) = itertools.islice(loader_of(name, SETTINGS | {"mixup_probability": 1.0}, **more), 1)
    assert [item.get(UNLABELLED, False) for item in batch] == [False] * 4 + [True] * 2
    assert not any("instances" in item for item in batch[4:])


def test_training_at_other_sides_than_evaluation_is_refused():
    """Where one of the two is changed and the other forgotten."""
    mapper = LazyConfig.load("configs/bccd/student_yolox.py").dataloader.train.mapper
    mapper.size_period, mapper.off_from_batch = 1, None
    mapper.size = 416
    with pytest.raises(UserError, match="size is 416, that of evaluation.* are 192 to 256: set bo"):
        instantiate(mapper)
    mapper.sizes = [384, 416]
    assert instantiate(mapper).size == 416
    mapper.sizes = None
    assert instantiate(mapper).sizes is None


def test_same_seed_gives_the_same_pictures_whatever_loads_them(name, expected):
    np.random.seed(1)
    assert batches(loader_of(name)) == expected
    assert batches(loader_of(name, num_workers=2)) == expected
    assert batches(loader_of(name, seed=6)) != expected


@pytest.mark.parametrize("skipped", [2, 7, 9])
def test_stream_that_begins_later_is_the_rest_of_it(name, expected, skipped):
    loader = loader_of(name)
    assert skip_batches(loader, skipped)
    assert batches(loader, STEPS - skipped) == expected[skipped:]


def test_two_processes_are_dealt_one_stream(name, expected, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    dealt = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        dealt.append(batches(loader_of(name)))
    for whole, first, second in zip(expected, *dealt, strict=True):
        assert [first[0], second[0], first[1], second[1]] == whole


def test_all_images_of_a_batch_have_one_size_which_changes_with_the_period(expected):
    sizes = [{image[0] for _, image, *_ in batch} for batch in expected]
    assert all(len(of_batch) == 1 for of_batch in sizes)
    assert all(sizes[i] == sizes[i - i % 3] for i in range(STEPS))
    assert len({size for of_batch in sizes for size in of_batch}) > 1
    # Every size comes.
    mapper, seen = MosaicMapper(**SETTINGS | dict(mosaic_probability=0, mixup_probability=0)), set()
    mapper.bind([], 0)
    for batch in range(0, 90, 3):
        mapper.at_batch(batch)
        seen.add(mapper._side())
    assert seen == {32, 64, 96}


def test_from_a_batch_on_there_is_one_image_in_a_picture(name):
    settings = dict(size=64, off_from_batch=3, hsv_probability=0)
    pictures = [item for batch in items(loader_of(name, settings), 6) for item in batch]
    alone = [is_one_image(item) for item in pictures]
    assert alone[12:] == [True] * 12 and sum(alone[:12]) <= 2  # Where all boxes were dropped.
    always = [i for b in items(loader_of(name, settings | dict(off_from_batch=0)), 3) for i in b]
    never = [i for b in items(loader_of(name, settings | dict(off_from_batch=None)), 6) for i in b]
    assert all(map(is_one_image, always)) and not all(map(is_one_image, never[12:]))


def items(loader, steps):
    iterator = iter(loader)
    return [next(iterator) for _ in range(steps)]


def is_one_image(item):
    """Wide and tall images of 3 : 2 fill a part of the square of 64."""
    height, width = (64, 42) if item["height"] > item["width"] else (42, 64)
    fill = item["image"].clone()
    fill[:, :height, :width] = 114
    real = item["valid"].clone()
    real[:height, :width] ^= True
    return bool((fill == 114).all()) and not real.any()


def test_accumulation_of_two_halves_makes_the_same_pictures(name, expected):
    """With the settings in batches that the config computes."""
    settings = SETTINGS | dict(size_period=6, off_from_batch=16)
    halves = batches(loader_of(name, settings, total_batch_size=2), 2 * STEPS)
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == expected


def test_groups_of_wide_and_tall_images_are_refused(name):
    with pytest.raises(UserError, match="MosaicMapper.*set .*aspect_ratio_grouping=False") as error:
        loader_of(name, aspect_ratio_grouping=True)
    assert "\n" not in str(error.value)


def test_dataset_without_objects_ends_in_an_error(tmp_path):
    bare = coco_json(**write_mixed_coco(tmp_path, number=1))
    with pytest.raises(UserError, match="none of the 1 images has an object"):
        loader_of(bare, filter_empty=False)


class Told(DatasetMapper):
    """A user's, of both protocols."""

    def bind(self, records, seed):
        self.bound = len(records), seed, records[0]["image_id"]

    def at_batch(self, number):
        self.number = number

    def __call__(self, record):
        return super().__call__(record) | {"told": (self.number, *self.bound)}


def test_any_mapper_may_ask_for_records_and_batch(name):
    mapper = Told(True, augmentations=[T.FixedSizeCrop((96, 96))], image_format="BGR")
    loader = build_train_loader(
        dataset=name, mapper=mapper, total_batch_size=2, seed=3, aspect_ratio_grouping=False
    )
    told = [item["told"] for batch in items(loader, 3) for item in batch]
    assert told == [(i, 11, 3, 100) for i in (0, 0, 1, 1, 2, 2)]
    assert not hasattr(mapper, "bound")  # A copy of it is.


def test_workers_have_the_records_once(name):
    """Bound and told, it can go to another process, and records are not there twice."""
    loader = loader_of(name)
    next(iter(loader))
    there = pickle.loads(pickle.dumps(loader.dataset))
    assert content(there[(9, 3)]) == content(loader.dataset[(9, 3)])
    mapper = there.mapper.mapper.mapper
    assert isinstance(mapper, MosaicMapper) and mapper._records is there.records


def test_it_tells_by_itself_what_it_pads(name, caplog):
    loader_of(name)
    assert "every pixel is taken for real" not in caplog.text


def test_two_loaders_do_not_share_a_mapper(name, tmp_path):
    mapper, more = MosaicMapper(**SETTINGS), dict(total_batch_size=4, aspect_ratio_grouping=False)
    other = coco_json(**write_mixed_coco(tmp_path, number=2))
    first = build_train_loader(dataset=name, mapper=mapper, seed=7, **more)
    build_train_loader(dataset=other, mapper=mapper, seed=6, **more)
    assert batches(first, 2) == batches(loader_of(name), 2)


def test_neither_fill_nor_seams_of_a_mosaic_are_distilled(name):
    settings = dict(size=128, scale=(0.8, 1.2), mixup_probability=0)
    batch = next(iter(loader_of(name, settings)))
    assert [m.sum() for m in image_area(batch)["masks"]] == [i["valid"].sum() for i in batch]
    torch.manual_seed(0)
    teacher = FrozenTeacher(
        model=PlainDetector(num_classes=3, channels=8), allow_random=True, precision="fp32"
    )
    student = PlainDetector(num_classes=3, channels=6)
    model = DistilledDetector(student=student, teacher=teacher, head=DFDHead(criterion=MimicLoss()))

    def losses(change):
        changed = []
        for item in batch:
            image = item["image"].clone()
            image[:, change(item["valid"])] = torch.randint(256, (3, 1), dtype=torch.uint8)
            changed.append({**item, "image": image})
        found = model.train()(changed)
        return {k: v for k, v in found.items() if k.startswith("loss_dfd")}

    before = losses(torch.zeros_like)
    assert len(before) == 2
    torch.testing.assert_close(losses(lambda valid: ~valid), before)
    after = losses(lambda valid: valid)
    assert all(abs(after[k] - v) > 1e-3 * v for k, v in before.items())


def test_evaluation_is_refused_a_mosaic(name):
    with pytest.raises(UserError, match="no other images.*build_train_loader"):
        next(iter(build_test_loader(dataset=name, mapper=MosaicMapper(size=64))))


def config_of(data, *overrides, **settings):
    """The loaders of a dataset's config in YOLOX's form."""
    configs = Path(__file__).parents[2] / "configs" / "common" / "data"
    cfg = OmegaConf.create(flags={"allow_objects": True})
    cfg.train = {"seed": 7, "max_iter": 600, "accumulation_steps": 2}
    cfg.dataloader = LazyConfig.load(str(configs / f"{data}.py")).dataloader
    LazyConfig.load(str(configs / "mosaic.py"), "use_mosaic")(cfg.dataloader, **settings)
    return LazyConfig.apply_overrides(cfg, list(overrides))


@pytest.mark.parametrize("data", ["coco", "coco_json", "voc", "shapes"])
def test_config_makes_yolox_data_of_any_dataset(data):
    mapper = "dataloader.train.mapper"
    sizes = [f"{mapper}.size=416", f"{mapper}.sizes=[384,416]"]
    cfg = config_of(data, *sizes, scale=(0.5, 1.5), mixup_probability=0)
    mapper = instantiate(cfg.dataloader.train.mapper)
    assert mapper.size == 416 and mapper.sizes == (384, 416)
    assert (mapper.off_from_batch, mapper.size_period) == (2 * 570, 2 * 10)
    assert mapper.affine.scale == (0.5, 1.5) and mapper.mixup_probability == 0
    assert cfg.dataloader.train.aspect_ratio_grouping is False
    test = cfg.dataloader.test.mapper
    assert (instantiate(test.augmentations[0]).size, test.image_format) == (416, "BGR")


def test_saved_config_makes_the_same_pictures(tmp_path):
    root = f"dataloader.train.dataset.root={tmp_path / 'shapes'}"
    small = [f"dataloader.train.dataset.{k}" for k in ("num_train=6", "num_val=2", "image_size=64")]
    batch = ["dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0"]
    cfg = config_of("shapes", root, *small, *batch, size=64, sizes=(64, 96))
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    again = LazyConfig.load(str(tmp_path / "config.yaml"))
    first, second = (batches(instantiate(c.dataloader.train), 3) for c in (cfg, again))
    assert first == second
    tested = [item["image"].shape[1:] for (item,) in instantiate(again.dataloader.test)]
    assert tested == [(64, 64)] * 2

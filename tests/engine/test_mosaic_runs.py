"""train_net.py on YOLOX's data: what it sees, its schedule and its EMA."""

import json

import pytest
import torch
from commands import run
from detectron2.modeling.meta_arch import RetinaNet
from toys import dense_config

from dfd.data import MosaicMapper
from dfd.engine.build import build_loader
from dfd.engine.config.load import load_config

pytestmark = pytest.mark.slow

# Mosaic ends and the rate becomes constant at iteration 6; sizes change every second.
RUN = [
    "train.max_iter=8",
    "train.checkpointer.period=3",
    "train.log_period=2",
    "train.val_loss.period=4",
    "train.val_loss.num_images=2",
    "optimizer.lr=1e-3",
]


@pytest.fixture(scope="module")
def watched(tmp_path_factory, data, configs):
    """A run, and what it has seen."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        seen = watch(patch)
        run(configs["mosaic"], *data, *RUN, f"train.output_dir={folder}")
    return folder, seen


@pytest.fixture(scope="module")
def straight(watched):
    return watched[0]


def watch(patch):
    """What a run trains on: size and whether it is a single image, of each image of each batch."""
    forward, seen = RetinaNet.forward, []

    def watching(model, batch):
        if "valid" in batch[0]:  # Those of a loss on test images are of another mapper.
            seen.append([(item["image"].shape[1], is_one_image(item)) for item in batch])
        return forward(model, batch)

    patch.setattr(RetinaNet, "forward", watching)
    return seen


def is_one_image(item):
    """Whether the real pixels are an image of 64 x 80 in the corner, but for resized borders."""
    valid = item["valid"]
    size = len(valid)
    height = size * 51 // 64
    inner = valid[2 : height - 2, 2 : size - 2]
    return bool(inner.all() and not valid[height + 1 :].any())


def test_run_sees_mosaics_then_single_images_in_sizes_that_change(watched):
    _, seen = watched
    sizes = [{size for size, _ in batch} for batch in seen]
    assert len(seen) == 8 and all(len(of_batch) == 1 for of_batch in sizes)
    assert sizes[::2] == sizes[1::2] and len(set(map(tuple, sizes))) > 1
    alone = [all(single for _, single in batch) for batch in seen]
    assert alone[6:] == [True, True] and not any(alone[:6])


def test_schedule_and_ema_are_yolox_and_the_loss_on_test_images_is_there(straight):
    metrics = [json.loads(line) for line in open(straight / "metrics.json")]
    rates = {line["iteration"]: line["lr"] for line in metrics if "lr" in line}
    assert rates[7] == pytest.approx(0.05 * 1e-3)
    assert any("val_loss" in line for line in metrics)
    assert (straight / "model_ema.pth").exists()


def test_dry_run_leaves_nothing(data, configs, tmp_path, capsys):
    out = tmp_path / "out"
    run(configs["mosaic"], "--dry-run", *data, f"train.output_dir={out}")
    assert not out.exists()
    assert "loss_box_reg" in capsys.readouterr().out


def loader_of(config, *overrides):
    cfg = load_config(config, overrides)
    loader, _ = build_loader(cfg)
    return cfg, loader.dataset.mapper.mapper.mapper


@pytest.mark.parametrize("steps", [1, 2])
def test_closing_part_and_period_follow_the_length_of_the_run(data, configs, steps):
    accumulation = f"train.accumulation_steps={steps}"
    _, mapper = loader_of(configs["mosaic"], *data, accumulation, "train.max_iter=40")
    assert isinstance(mapper, MosaicMapper)
    assert (mapper.off_from_batch, mapper.size_period) == (30 * steps, 2 * steps)
    # 8 images in batches of 2.
    cfg, mapper = loader_of(configs["mosaic"], *data, accumulation, "train.epochs=3")
    assert cfg.train.max_iter == 12 and mapper.off_from_batch == 9 * steps


def test_two_halves_of_a_step_are_the_same_pictures(data, configs):
    """Under accumulation a run sees what it would have seen without."""

    def shown(*overrides):
        _, loader = None, build_loader(load_config(configs["mosaic"], [*data, *overrides]))[0]
        iterator = iter(loader)
        steps = 2 if overrides else 1
        return [item["image"] for _ in range(8 * steps) for item in next(iterator)]

    pairs = zip(shown(), shown("train.accumulation_steps=2"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_toy_config_is_a_retinanet_on_mosaics(configs):
    cfg = load_config(configs["mosaic"])
    assert cfg.model._target_ == dense_config("retinanet")._target_
    assert cfg.dataloader.test.mapper.augmentations[0].size == 64
    assert cfg.dataloader.train.aspect_ratio_grouping is False

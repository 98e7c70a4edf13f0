"""Masks and keypoints, from annotations with faults, in runs of every kind."""

import json

import pytest
from coco_files import write_coco
from commands import run

pytestmark = pytest.mark.slow


def labelled(kind, a):
    """An annotation with a polygon or keypoints over its box."""
    x, y, w, h = a["bbox"]
    if kind == "masks":
        return {**a, "segmentation": [[x, y, x + w, y, x + w, y + h]]}
    points = [v for i in range(5) for v in (x + i, y + i, 2)]
    return {**a, "keypoints": points, "num_keypoints": 5}


@pytest.fixture
def write(tmp_path):
    def write(kind, spoil=lambda i, a: a):
        overrides = []
        for split in ("train", "test"):
            overrides += [
                f"dataloader.{split}.{o}" for o in write_coco(tmp_path / "data", split, 4)
            ]
            path = tmp_path / "data" / f"{split}.json"
            data = json.loads(path.read_text())
            annotations = [labelled(kind, a) for a in data["annotations"]]
            data["annotations"] = [spoil(i, a) for i, a in enumerate(annotations)]
            path.write_text(json.dumps(data))
        return overrides

    return write


@pytest.fixture
def lines_of(configs, tmp_path, capsys):
    """Runs train_net.py; the last evaluation's metrics, or the error's line."""

    def run_it(kind, flags, *overrides):
        out = tmp_path / "out"
        common = [f"train.output_dir={out}", "train.max_iter=1"]
        try:
            run(configs[kind], *flags, *common, *overrides)
        except SystemExit as stop:
            assert stop.code == 1
            return capsys.readouterr().err.strip().splitlines()[-1]
        lines = (out / "metrics.json").read_text().splitlines() if not flags else []
        return {key: value for line in lines for key, value in json.loads(line).items()}

    return run_it


def without(key):
    """Every second annotation loses its label."""
    return lambda i, a: {k: v for k, v in a.items() if k != key or i % 2}


@pytest.mark.parametrize("kind, key", [("masks", "segmentation"), ("keypoints", "keypoints")])
def test_objects_without_label_do_not_stop_a_run(write, lines_of, kind, key):
    more = ["dataloader.evaluator.kpt_oks_sigmas=[.1,.1,.1,.1,.1]"] if kind == "keypoints" else []
    data = write(kind, without(key))
    metrics = lines_of(kind, [], *data, *more, "train.eval_period=1")
    assert {"masks": "loss_mask", "keypoints": "loss_keypoint"}[kind] in metrics
    # The model knows nothing yet: 0, or near to it, but a number.
    assert 0 <= metrics["bbox/AP"] < 50


@pytest.mark.parametrize("kind, key", [("masks", "segmentation"), ("keypoints", "keypoints")])
@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_data_without_any_label_are_refused(write, lines_of, kind, key, flags):
    data = write(kind, lambda i, a: {k: v for k, v in a.items() if k != key})
    line = lines_of(kind, flags, *data)
    assert f"the student learns {kind}, but no annotation of dataset" in line


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_mapper_that_makes_no_masks_is_refused(write, lines_of, flags):
    line = lines_of(
        "masks", flags, *write("masks"), "dataloader.train.mapper.use_instance_mask=False"
    )
    assert line.endswith("set dataloader.train.mapper.use_instance_mask=True")


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_run_lengths_are_refused_until_the_setting_named_is_set(write, lines_of, flags):
    rle = {"size": [64, 80], "counts": [2000, 40, 64 * 80 - 2040]}
    data = write("masks", lambda i, a: {**a, "segmentation": rle} if i == 3 else a)
    line = lines_of("masks", flags, *data)
    remedy = "dataloader.train.mapper.instance_mask_format=bitmask"
    assert line.endswith(f"which cannot become polygons exactly: set {remedy}")
    assert isinstance(lines_of("masks", flags, *data, remedy), dict)


def test_keypoints_of_another_number_are_refused(write, lines_of):
    data = write("keypoints")
    line = lines_of("keypoints", ["--dry-run"], *data)
    assert "set dataloader.evaluator.kpt_oks_sigmas to a list of 5 numbers" in line
    line = lines_of(
        "keypoints", ["--dry-run"], *data, "model.roi_heads.keypoint_head.num_keypoints=7"
    )
    assert "the student learns 7 keypoints, but dataset" in line
    line = lines_of("keypoints", ["--dry-run"], *data, "dataloader.train.mapper.use_keypoint=False")
    assert line.endswith("set dataloader.train.mapper.use_keypoint=True")


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_boxes_of_keypoint_data(write, lines_of, flags):
    assert isinstance(lines_of("student", flags, *write("keypoints"), "train.eval_period=1"), dict)


@pytest.mark.parametrize("kind", ["masks", "keypoints"])
def test_evaluation_where_only_boxes_are_labelled(write, lines_of, tmp_path, kind):
    more = ["dataloader.evaluator.kpt_oks_sigmas=[.1,.1,.1,.1,.1]"] if kind == "keypoints" else []
    data = write(kind)
    assert isinstance(lines_of(kind, [], *data, *more), dict)
    other = tmp_path / "boxes"
    other.mkdir()
    test = [f"dataloader.test.{o}" for o in write_coco(other, "test", 3)]
    weights = f"train.init_checkpoint={tmp_path}/out/model_final.pth"
    assert isinstance(lines_of(kind, ["--eval-only"], *data, *test, weights), dict)
    if kind == "keypoints":  # No sigmas.
        line = lines_of(kind, ["--eval-only"], *data, weights)
        assert "needs a sigma for each" in line

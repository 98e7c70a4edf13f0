"""dfd analyse: statistics by hand, a run from end to end, refusals of one line."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from coco_files import write_coco
from detectron2.config import instantiate
from detectron2.structures import BoxMode
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import stats
from toys import build, faster_rcnn_config, save_checkpoint

from dfd.engine import argument_parser, main
from dfd.errors import UserError
from dfd.research.analyse import analyse, command
from dfd.research.analyse.collect import (
    DETECTED,
    FALSE,
    GROUPS,
    MISSED,
    LevelTally,
    Tally,
    add_image,
    collect,
    judge,
)
from dfd.research.analyse.load import (
    LabelledImage,
    TestImages,
    build_detector,
    find_checkpoints,
    label_image,
    load_run,
    load_snapshots,
    trained_iterations,
)
from dfd.research.analyse.matching import (
    IGNORED,
    UNMATCHED,
    cells_inside,
    match_detections,
    owners,
    size_classes,
)
from dfd.research.analyse.numbers import ALL, summarise
from dfd.research.analyse.statistics import (
    LogHistogram,
    auc,
    auc_samples,
    interval,
    rank_correlation,
    ratio_samples,
)
from dfd.research.analyse.tables import auc_table, error_table, high_table, level_table
from dfd.research.output import NO_VALUE
from dfd.research.resampling import draw_images

pytestmark = pytest.mark.slow

CONFIGS = "tests/engine/configs"


def histogram(*values):
    result = LogHistogram()
    result.add(np.array(values, dtype=np.float32))
    return result


def test_a_histogram_has_the_exact_mean_and_near_quantiles():
    values = np.random.default_rng(0).lognormal(size=5000)
    result = histogram(*values[:2000])
    result.add(values[2000:].reshape(50, 60))
    assert result.count == 5000
    assert result.mean == pytest.approx(values.mean(), rel=1e-6)
    for fraction in (0.5, 0.9, 0.99):
        assert result.quantile(fraction) == pytest.approx(np.quantile(values, fraction), rel=0.02)


def test_a_histogram_takes_any_value_and_none():
    result = histogram(0.0, 1e-12, 1e12)
    assert result.count == 3 and result.quantile(0.2) <= 1e-7 and result.quantile(0.99) >= 1e7
    assert histogram(0.5, 0.5).quantile(0.99) == 0.5
    assert np.isnan(LogHistogram().quantile(0.5)) and np.isnan(LogHistogram().mean)
    centres, shares = result.density(20)
    assert shares.sum() == pytest.approx(1) and len(centres) == len(shares)


def test_ranks_and_their_correlation():
    assert rank_correlation(np.array([1, 2, 3]), np.array([9, 4, 1])) == pytest.approx(-1)
    assert np.isnan(rank_correlation(np.array([1, 2]), np.array([3, 3])))
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (2, 4, 6))
    expected = stats.spearmanr(a.ravel(), b.ravel()).statistic
    assert rank_correlation(a, b) == pytest.approx(expected)


VALUES = np.array([3.0, 1.0, 2.0, 1.0])
POSITIVE = np.array([True, True, False, False])


def test_auc_counts_pairs_and_half_of_ties():
    # 3 > 2, 3 > 1, 1 < 2, 1 = 1.
    assert auc(VALUES, POSITIVE).tolist() == [2.5 / 4]
    assert auc(-VALUES, POSITIVE).tolist() == [1.5 / 4]


def test_auc_compares_within_strata_only():
    strata = np.array([0, 1, 0, 1])
    assert auc(VALUES, POSITIVE, strata=strata).tolist() == [1.5 / 2]
    assert auc(VALUES, POSITIVE, strata=1 - strata).tolist() == [1.5 / 2]


def test_a_weighted_auc_is_that_of_repeated_cases():
    weights = np.array([[2, 1, 0, 3], [0, 0, 1, 1]])
    repeated = np.repeat(np.arange(4), weights[0])
    both = auc(VALUES, POSITIVE, weights=weights)
    assert both[0] == auc(VALUES[repeated], POSITIVE[repeated])[0]
    assert np.isnan(both[1])


def test_auc_agrees_with_the_rank_sum_test():
    rng = np.random.default_rng(1)
    values, positive = rng.integers(0, 20, 200).astype(float), rng.random(200) < 0.3
    u = stats.mannwhitneyu(values[positive], values[~positive]).statistic
    expected = u / (positive.sum() * (~positive).sum())
    assert auc(values, positive)[0] == pytest.approx(expected)


def test_images_are_resampled_as_a_whole():
    draws = np.array([[1, 1], [2, 0], [0, 2]])
    images = np.array([0, 1, 0, 1])
    result = auc_samples(VALUES, POSITIVE, images=images, draws=draws)
    assert result.tolist() == [0.625, 1.0, 0.5]
    within = auc_samples(VALUES, POSITIVE, images=images, draws=draws, strata=images)
    assert within.tolist() == [1.5 / 2, 1.0, 0.5]
    ratios = ratio_samples(np.array([1, 3]), np.array([2, 4]), draws)
    assert ratios.tolist() == [4 / 6, 0.5, 0.75]
    drawn = draw_images(5, 7)
    assert drawn.shape == (7, 5) and (drawn.sum(axis=1) == 5).all()


def test_an_image_that_is_drawn_twice_has_its_own_pairs_twice():
    values, positive = np.array([2.0, 1.0, 1.0, 2.0]), np.array([True, False, True, False])
    images, draws = np.array([0, 0, 1, 1]), np.array([[2, 1]])
    cases = {"images": images, "draws": draws, "strata": images}
    # Image 0 has the one pair that the positive wins.
    assert auc_samples(values, positive, within_images=True, **cases) == pytest.approx(2 / 3)


def test_an_interval_needs_values():
    low, high = interval(np.arange(1001.0))
    assert (low, high) == (25.0, 975.0)
    assert interval(np.array([1.0, np.nan, np.nan])) is None
    assert interval(np.empty(0)) is None


def boxes(*rows):
    return np.array(rows, dtype=float).reshape(-1, 4)


def test_sizes_are_those_of_coco():
    sides = [(31, 33), (32, 32), (96, 95), (96, 96)]
    sized = boxes(*([5, 5, 5 + w, 5 + h] for w, h in sides))
    assert size_classes(sized).tolist() == [0, 1, 1, 2]


def test_a_cell_is_inside_if_its_centre_is():
    # Centres at 4 and 12.
    inside = cells_inside(
        boxes([4, 0, 12, 8], [5, 0, 16, 16], [0, 5, 3, 9]), stride=8, rows=2, columns=2
    )
    assert inside.tolist() == [
        [[True, False], [False, False]],
        [[False, True], [False, True]],
        [[False, False], [False, False]],
    ]


def test_the_smallest_box_owns_a_cell():
    three = boxes([0, 0, 8, 16], [0, 0, 32, 32], [0, 0, 16, 8])
    three[2, 3] = 7.9
    inside = cells_inside(three, stride=8, rows=2, columns=3)
    assert owners(three, inside).tolist() == [[2, 2, 1], [0, 1, 1]]


def match(detections, scores, labels, classes=None, crowds=(), iou=0.5):
    return match_detections(
        detections=boxes(*detections),
        classes=np.zeros(len(detections), int) if classes is None else np.array(classes),
        scores=np.array(scores),
        labels=boxes(*labels),
        label_classes=np.zeros(len(labels), int),
        crowds=boxes(*crowds),
        crowd_classes=np.zeros(len(crowds), int),
        iou=iou,
    ).tolist()


A, B = [0, 0, 10, 10], [20, 0, 30, 10]


def test_the_surest_detection_takes_the_label_first():
    assert match([[0, 0, 10, 9], A], [0.6, 0.9], [A]) == [UNMATCHED, 0]
    assert match([[0, 0, 10, 9], A], [0.9, 0.6], [A]) == [0, UNMATCHED]


def test_a_detection_takes_the_label_that_it_overlaps_most_and_that_is_free():
    labels = [[0, 0, 10, 8], A]
    assert match([A], [0.9], labels) == [1]
    assert match([A, A], [0.9, 0.8], labels) == [1, 0]


def test_class_and_overlap_must_agree():
    assert match([A, B], [0.9, 0.8], [A, B], classes=[1, 0]) == [UNMATCHED, 1]
    # Half of the label, and an intersection over union of exactly one half.
    assert match([[0, 0, 10, 5]], [0.9], [A]) == [0]
    assert match([[0, 0, 10, 5]], [0.9], [A], iou=0.51) == [UNMATCHED]


def test_what_lies_in_a_crowd_of_its_class_is_not_judged():
    crowd = [[0, 0, 100, 100]]
    found = match([A, B, A], [0.9, 0.8, 0.7], [B], classes=[0, 0, 1], crowds=crowd)
    assert found == [IGNORED, 0, UNMATCHED]


def test_nothing_is_matched_with_nothing():
    assert match([], [], [A]) == []
    assert match([A], [0.9], []) == [UNMATCHED]


def coco_matches(found, classes, scores, labels, label_classes, crowds, crowd_classes, iou):
    """What pycocotools' COCOeval makes of one image: per detection, see ``match_detections``."""

    def annotation(number, box, kind, **more):
        x0, y0, x1, y1 = box.tolist()
        sides = [x1 - x0, y1 - y0]
        more["area"] = sides[0] * sides[1]
        return {
            "id": number,
            "image_id": 1,
            "category_id": int(kind),
            "bbox": [x0, y0, *sides],
            **more,
        }

    truth, results = COCO(), COCO()
    rows = [(*pair, 0) for pair in zip(labels, label_classes, strict=True)]
    rows += [(*pair, 1) for pair in zip(crowds, crowd_classes, strict=True)]
    categories, images = [{"id": k} for k in range(3)], [{"id": 1}]
    truth.dataset = {
        "images": images,
        "categories": categories,
        "annotations": [
            annotation(i, box, kind, iscrowd=crowd) for i, (box, kind, crowd) in enumerate(rows, 1)
        ],
    }
    results.dataset = {
        "images": images,
        "categories": categories,
        "annotations": [
            annotation(i, box, kind, score=score)
            for i, (box, kind, score) in enumerate(zip(found, classes, scores, strict=True), 1)
        ],
    }
    truth.createIndex()
    results.createIndex()
    evaluation = COCOeval(truth, results, "bbox")
    evaluation.params.iouThrs = np.array([iou])
    evaluation.params.areaRng = [[0, 1e10]]
    evaluation.evaluate()
    matches = [None] * len(found)
    for image in filter(None, evaluation.evalImgs):
        for number, label, ignored in zip(
            image["dtIds"], image["dtMatches"][0], image["dtIgnore"][0], strict=True
        ):
            matches[number - 1] = IGNORED if ignored else int(label) - 1 if label else UNMATCHED
    return matches


@pytest.mark.parametrize("iou", [0.3, 0.5, 0.75])
def test_detections_match_as_in_coco_evaluation(iou):
    generator = np.random.default_rng(0)

    def draw(number, spread):
        corners = generator.uniform(0, 40, (number, 2))
        return np.concatenate(
            [corners, corners + generator.uniform(5, spread, (number, 2))], axis=1
        )

    matched = 0
    for _ in range(50):
        labels, crowds = draw(8, 20), draw(1, 40)
        noisy = labels[generator.integers(0, 8, 15)] + generator.normal(0, 1, (15, 4))
        found = np.concatenate([noisy, draw(5, 20)])
        kinds = [generator.integers(0, 3, n) for n in (20, 8, 1)]
        scores = generator.permutation(20) / 20
        expected = coco_matches(found, kinds[0], scores, labels, kinds[1], crowds, kinds[2], iou)
        ours = match_detections(
            detections=found,
            classes=kinds[0],
            scores=scores,
            labels=labels,
            label_classes=kinds[1],
            crowds=crowds,
            crowd_classes=kinds[2],
            iou=iou,
        )
        assert ours.tolist() == expected
        matched += (ours >= 0).sum()
    assert matched > 50


def labelled(labels, crowds=(), size=(16, 16)):
    return LabelledImage(
        item={"image": torch.zeros(3, *size), "file_name": "x.png"},
        scale=np.ones(4),
        labels=boxes(*labels),
        label_classes=np.zeros(len(labels), int),
        crowds=boxes(*crowds),
        crowd_classes=np.zeros(len(crowds), int),
    )


def tally_of(image, disparity, detections=(), scores=(), stride=4):
    """One image on a single level p."""
    tally = Tally(7, {"p": LevelTally()})
    classes = np.zeros(len(detections), int)
    outcome = judge(image, boxes(*detections), classes, np.array(scores), 0.5)
    maps = {"p": np.array(disparity, dtype=np.float32)}
    add_image(tally, image, maps, outcome, last=maps, strides={"p": stride})
    return tally


# Two labels of four cells, the first found; a false detection; 4 x 4 cells of 4 pixels.
LABELS = [[0, 0, 8, 8], [8, 0, 16, 8]]
FOUND = [[0, 0, 8, 8], [0, 8, 8, 16]]
DISPARITY = [[1, 1, 4, 4], [1, 1, 4, 8], [2, 2, 0, 0], [2, 2, 0, 0]]


def test_disparity_is_told_by_outcome_region_and_size():
    tally = tally_of(labelled(LABELS), DISPARITY, FOUND, [0.9, 0.8])
    assert tally.outcomes[0].kinds.tolist() == [DETECTED, MISSED, FALSE]
    assert tally.means[0].tolist() == [[1, 1], [5, 5], [2, 2]]
    cells = dict(zip(GROUPS, tally.cells[0][0].tolist(), strict=True))
    # Cells, cells above the mean of 2, total.
    assert cells == {
        "image": [16, 4, 32],
        "background": [4, 0, 0],
        "detected": [4, 0, 4],
        "missed": [4, 4, 20],
        "false": [4, 0, 8],
        "errors": [8, 4, 28],
    }
    level = tally.levels["p"]
    assert level.regions.tolist() == [[12, 12], [20, 4]]
    assert level.sizes.tolist() == [[24, 8], [0, 0], [0, 0], [8, 8]]
    assert level.correlations == [pytest.approx(1)]


def test_cells_in_a_crowd_are_neither_object_nor_background():
    tally = tally_of(labelled(LABELS, crowds=[[0, 0, 16, 12]]), DISPARITY)
    assert tally.levels["p"].sizes.tolist() == [[24, 8], [0, 0], [0, 0], [4, 4]]
    assert tally.cells[0][0, GROUPS.index("background")].tolist() == [4, 0, 4]


def test_a_box_between_the_centres_has_no_disparity():
    tally = tally_of(labelled([[3, 3, 5, 5], *LABELS]), DISPARITY)
    assert np.isnan(tally.means[0][0]).all()
    numbers = summarise(tally, strides=[4])["errors"]
    assert numbers["counts"]["missed"] == {"all": 3, "small": 3, "medium": 0, "large": 0}
    assert numbers["auc"][ALL]["missed"] == 2
    assert numbers["disparity"][ALL]["missed"] == 3


def test_levels_are_joined_by_cells_in_a_box_and_by_area_in_a_region():
    tally = Tally(7, {"p": LevelTally(), "q": LevelTally()})
    image = labelled(LABELS)
    outcome = judge(image, boxes(*FOUND), np.zeros(2, int), np.array([0.9, 0.8]), 0.5)
    maps = {"p": np.array(DISPARITY, np.float32), "q": np.array([[0, 10], [0, 2]], np.float32)}
    add_image(tally, image, maps, outcome, last=maps, strides={"p": 4, "q": 8})
    # The mean of four cells of 5 and one of 10.
    np.testing.assert_allclose(tally.means[0][1], [6, 5, 10])
    numbers = summarise(tally, strides=[4, 8])["errors"]["high_share"]
    assert numbers["q"]["image"] == 1 / 4 and numbers["p"]["image"] == 1 / 4
    # On each level one of the two errors is high: 64 of 128 pixels.
    assert numbers[ALL]["errors"] == 1 / 2
    assert numbers[ALL]["errors_minus_image"] == {"value": 1 / 4, "interval": None}


def test_what_cannot_be_measured_is_none():
    numbers = summarise(tally_of(labelled([]), np.ones((4, 4))), strides=[4])
    json.dumps(numbers, allow_nan=False)
    assert numbers["errors"]["auc"][ALL]["auc"] is None
    assert numbers["errors"]["disparity"][ALL]["missed"] is None
    assert numbers["levels"]["p"]["high"]["ratio"] is None
    assert numbers["levels"]["p"]["sizes"]["large"] == {"mean": None, "cells": 0}


def test_tables_show_what_is_missing_as_a_dash():
    last = summarise(tally_of(labelled([]), np.ones((4, 4))), strides=[4])
    assert auc_table(last)[1] == [ALL, NO_VALUE, NO_VALUE, "0", "0"]
    assert error_table(last)[1][1:4] == [NO_VALUE] * 3
    assert level_table(last)[1][0] == "p"


def test_tables_hold_the_numbers():
    last = summarise(tally_of(labelled(LABELS), DISPARITY, FOUND, [0.9, 0.8]), strides=[4])
    last["errors"]["auc"][ALL] |= {"auc": 0.6, "interval": (0.55, 0.65), "missed": 9}
    assert auc_table(last)[1][:4] == [ALL, "0.6", "0.55 to 0.65", "9"]
    high = last["errors"]["high_share"][ALL]
    high["errors_minus_image"] = {"value": 0.25, "interval": (0.1, 0.4)}
    assert high_table(last)[1][-2] == "+25 (+10 to +40)"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Overrides that name a small COCO dataset for training and testing."""
    root = tmp_path_factory.mktemp("coco")
    splits = {"train": write_coco(root, "train", 4), "test": write_coco(root, "val", 3, seed=1)}
    return [f"dataloader.{split}.{o}" for split, options in splits.items() for o in options]


def train(config, *arguments):
    arguments = ["--config-file", f"{CONFIGS}/{config}.py", *arguments]
    main(argument_parser().parse_args(arguments))


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """A distilled run of four iterations with adapters, which kept two checkpoints."""
    root = tmp_path_factory.mktemp("run")
    torch.manual_seed(5)
    teacher = save_checkpoint(instantiate(faster_rcnn_config(channels=12)), root / "teacher.pth")
    train(
        "dfd",
        *data,
        f"train.output_dir={root / 'dfd'}",
        f"model.teacher.checkpoint={teacher}",
        "model.head.criterion.scale=level",
    )
    return root / "dfd"


@pytest.fixture(scope="module")
def analysis(run, tmp_path_factory):
    """The folder of its analysis; every detection counts, however unsure."""
    out = tmp_path_factory.mktemp("analysis") / "new" / "out"
    sections = analyse(run=str(run), out=str(out), num_pictures=2, score=0.0, iou=0.1)
    assert sum(len(section.tables) for section in sections) == 8
    return out


def test_the_folder_is_complete(analysis):
    assert sorted(os.listdir(analysis)) == [
        "analysis.json",
        "analysis.md",
        "distribution.png",
        "errors.png",
        "image_1.png",
        "image_2.png",
        "index.html",
        "sizes.png",
        "training.png",
    ]
    page = (analysis / "index.html").read_text()
    assert page.count("<img ") == page.count('src="data:image/png') == page.count("src=") == 6
    assert "http" not in page and "<script" not in page
    text = (analysis / "analysis.md").read_text()
    assert text.count("](") == 6
    for name in ("image_1.png", "training.png"):
        assert f"]({name})" in text
    assert "nan" not in text.lower().split()


def test_the_numbers_add_up(analysis):
    numbers = json.loads((analysis / "analysis.json").read_text())
    assert (numbers["images"], numbers["images_in_data"], numbers["labels"]) == (3, 3, 6)
    assert [point["iteration"] for point in numbers["checkpoints"]] == [2, 4]
    first, last = numbers["checkpoints"]
    for point in (first, last):
        assert list(point["levels"]) == ["p2", "p3", "p4", "p5", "p6"]
        # 64 x 80 pixels: 16 x 20 cells of 4 pixels, and so on up to 1 x 2 of 64.
        assert [level["cells"] for level in point["levels"].values()] == [
            3 * 320,
            3 * 80,
            3 * 20,
            3 * 6,
            3 * 2,
        ]
        for level in point["levels"].values():
            assert sum(size["cells"] for size in level["sizes"].values()) == level["cells"]
        counts = point["errors"]["counts"]
        assert counts["detected"]["all"] + counts["missed"]["all"] == 6
        assert counts["false"]["all"] > 0
    assert last["levels"]["p2"]["rank_correlation_with_last"] == pytest.approx(1)
    assert first["levels"]["p2"]["rank_correlation_with_last"] < 1
    assert last["levels"]["p2"]["mean"] != first["levels"]["p2"]["mean"]


def test_disparity_is_that_of_the_evaluated_student_image_by_image(run, analysis):
    cfg = load_run(str(run))
    model = build_detector(cfg, str(run))
    checkpoints = find_checkpoints(str(run), max_iter=4, limit=9)
    last = load_snapshots(model, checkpoints, ["disc", "box", "bar"])[-1]
    saved = torch.load(run / "model_final.pth", weights_only=True)
    adapter = last.head.adapters["p2"]
    torch.testing.assert_close(adapter.weight, saved["head"]["adapters.p2.weight"])
    running = last.student.backbone.bottom_up.stem.conv1.norm.running_mean
    torch.testing.assert_close(
        running, saved["model"]["backbone.bottom_up.stem.conv1.norm.running_mean"]
    )
    total = 0.0
    with torch.no_grad():
        for image in TestImages(cfg, None):
            pixels = last.student.preprocess_image([image.item]).tensor
            s = adapter(last.student.backbone(pixels)["p2"][:, :, :16, :20])
            pixels = model.teacher.model.preprocess_image([image.item]).tensor
            t = model.teacher.model.backbone(pixels)["p2"][:, :, :16, :20]
            total += ((s - t) ** 2).mean().item() / t.var(correction=0).item()
    numbers = json.loads((analysis / "analysis.json").read_text())
    mean = numbers["checkpoints"][-1]["levels"]["p2"]["mean"]
    assert mean == pytest.approx(total / 3, rel=0.02)  # The teacher may run in bf16.
    assert not last.student.training


def test_a_student_that_was_given_another_order_than_its_own_is_analysed(run, tmp_path):
    content = torch.load(run / "model_final.pth", weights_only=True)
    content["settings"]["model.input_format"] = "RGB"
    torch.save(content, tmp_path / "model_final.pth")
    model = build_detector(load_run(str(run)), str(run))
    model.input_format = "RGB"  # As of model.input_format; the student's own stays.
    checkpoints = find_checkpoints(str(tmp_path), max_iter=4, limit=1)
    assert load_snapshots(model, checkpoints, ["disc", "box", "bar"])


def test_boxes_are_measured_at_the_size_of_the_input(run):
    enlarged = "dataloader.test.mapper.augmentations.0.short_edge_length=128"
    for overrides, size in (((), (64, 80)), ([enlarged], (128, 160))):
        image = next(iter(TestImages(load_run(str(run), overrides), 1)))
        assert tuple(image.item["image"].shape[-2:]) == size
        sides = image.labels[:, 2:] - image.labels[:, :2]
        scale = size[0] / 64
        np.testing.assert_allclose(sorted(sides.tolist()), np.array([[30, 20], [31, 20]]) * scale)


def test_detections_are_measured_at_the_size_of_the_input(run):
    enlarged = "dataloader.test.mapper.augmentations.0.short_edge_length=128"
    cfg = load_run(str(run), [enlarged])
    model = build_detector(cfg, str(run))
    checkpoints = find_checkpoints(str(run), max_iter=4, limit=1)
    snapshots = load_snapshots(model, checkpoints, ["disc", "box", "bar"])
    images = TestImages(cfg, 1)
    settings = {"score": 0.0, "iou": 1.0, "num_examples": 1}
    _, (example,) = collect(model=model, snapshots=snapshots, images=images, **settings)
    assert example.image.shape == (128, 160, 3)
    ((_, _, outcome),) = example.views
    found = outcome.boxes[outcome.kinds == FALSE]
    with torch.no_grad():
        (raw,) = snapshots[0].student.inference([next(iter(images)).item], do_postprocess=False)
    assert len(found) > 0
    np.testing.assert_allclose(found, raw.pred_boxes.tensor.numpy(), atol=1e-3)


def test_an_image_is_joined_with_its_labels():
    def annotation(box, category, mode=BoxMode.XYWH_ABS, **more):
        return {"bbox": box, "bbox_mode": mode, "category_id": category, **more}

    item = {"image": torch.zeros(3, 50, 100), "height": 100, "width": 200}
    image = label_image(
        item,
        [
            annotation([10, 20, 40, 60], 2),
            annotation([10, 20, 40, 60], 1, BoxMode.XYXY_ABS),
            annotation([0, 0, 200, 100], 0, iscrowd=1),
            annotation([-30, 0, 20, 20], 0),  # Outside the image.
            annotation([-10, 20, 400, 20], 1),  # Clipped to it.
        ],
    )
    assert image.labels.tolist() == [[5, 10, 25, 40], [5, 10, 20, 30], [0, 10, 100, 20]]
    assert image.label_classes.tolist() == [2, 1, 1]
    assert image.crowds.tolist() == [[0, 0, 100, 50]]
    assert image.scale.tolist() == [0.5] * 4
    empty = label_image(item, [])
    assert empty.labels.shape == empty.crowds.shape == (0, 4)


def test_an_earlier_analysis_is_replaced_with_the_same_numbers(run, analysis):
    before = (analysis / "analysis.json").read_bytes()
    (analysis / "image_7.png").touch()
    settings = {"num_pictures": 2, "score": 0.0, "iou": 0.1}
    analyse(run=str(run), out=str(analysis), **settings)
    assert (analysis / "analysis.json").read_bytes() == before
    assert not (analysis / "image_7.png").exists()


def test_one_checkpoint_and_some_images_do(run, tmp_path):
    seen = []
    analyse(
        run=str(run),
        out=str(tmp_path / "out"),
        num_images=2,
        num_pictures=0,
        max_checkpoints=1,
        progress=lambda *counts: seen.append(counts),
    )
    numbers = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert (numbers["images"], numbers["labels"]) == (2, 4)
    assert [point["iteration"] for point in numbers["checkpoints"]] == [4]
    assert seen == [(1, 2), (2, 2)]
    # So short a training leaves no detection with a score of 0.5.
    assert numbers["checkpoints"][0]["errors"]["counts"]["false"]["all"] == 0
    assert "training.png" not in os.listdir(tmp_path / "out")


def test_checkpoints_are_spread_over_time(tmp_path):
    for iteration in (49, 99, 149, 199):
        (tmp_path / f"model_{iteration:07d}.pth").touch()
    (tmp_path / "model_best.pth").touch()

    def iterations(limit):
        found = find_checkpoints(str(tmp_path), max_iter=200, limit=limit)
        return [(point.iteration, os.path.basename(point.path)) for point in found]

    # After 200 iterations both were written.
    last = (200, "model_final.pth")
    assert [iteration for iteration, _ in iterations(9)] == [50, 100, 150, 200]
    assert iterations(2) == [(50, "model_0000049.pth"), last]
    assert iterations(1) == [last]


def spoil(folder, what):
    """Break a copy of a run."""
    final = folder / "model_final.pth"
    if what == "unfinished":
        final.unlink()
    elif what == "other model":
        torch.save({"model": build("fcos").state_dict()}, final)
    elif what == "diverged":
        content = torch.load(final, weights_only=True)
        content["head"]["adapters.p2.bias"][:] = torch.nan
        torch.save(content, final)
    elif what == "no adapters":
        content = torch.load(final, weights_only=True)
        del content["head"]
        torch.save(content, final)
    elif what == "other classes":
        content = torch.load(final, weights_only=True)
        content["class_names"] = ["a", "b", "c"]
        torch.save(content, final)
    elif what == "no config":
        (folder / "config.yaml").unlink()
    elif what == "broken config":
        (folder / "config.yaml").write_text("{")
    elif what == "other teacher":
        summary = json.loads((folder / "summary.json").read_text())
        summary["teacher"]["sha256"] = "0" * 64
        (folder / "summary.json").write_text(json.dumps(summary))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("unfinished", "the run has not finished"),
        ("other model", "--run: .* does not fit the model"),
        ("diverged", "on p2 after 4 iterations is not finite"),
        ("no adapters", "does not hold the head's adapters"),
        ("other classes", r"trained on \['a', 'b', 'c'\]"),
        ("no config", "it is no run"),
        ("broken config", "config.yaml cannot be loaded"),
        ("other teacher", "is not the teacher that .* was trained under"),
    ],
)
def test_a_run_that_cannot_be_analysed_is_refused(run, tmp_path, what, message):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    spoil(copy, what)
    with pytest.raises(UserError, match=message) as error:
        analyse(run=str(copy), out=str(tmp_path / "out"), num_images=1, max_checkpoints=1)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"run": "none"}, "no such folder"),
        ({"num_images": 0}, "--num-images 0"),
        ({"num_pictures": -1}, "--num-pictures -1"),
        ({"max_checkpoints": 0}, "--max-checkpoints 0"),
        ({"score": 1.5}, "--score 1.5"),
        ({"iou": 0.0}, "--iou 0"),
        (
            {"overrides": ["dataloader.test.datasett=x"]},
            "dataloader.test has no 'datasett'",
        ),
        ({"overrides": ["model.teacher.checkpoint=/none.pth"]}, "no such file: /none.pth"),
        (
            {"overrides": ["model.teacher.checkpoint=''", "model.teacher.allow_random=True"]},
            "had random weights",
        ),
    ],
)
def test_settings_outside_their_range_are_refused(run, tmp_path, settings, message):
    given = {"run": str(run), "num_images": 1, "max_checkpoints": 1} | settings
    with pytest.raises(UserError, match=message):
        analyse(out=str(tmp_path / "out"), **given)
    assert not (tmp_path / "out").exists()


def test_test_data_without_labels_are_refused(run, tmp_path):
    path = load_run(str(run)).dataloader.test.dataset.json
    content = json.load(open(path))
    content["annotations"] = []
    (tmp_path / "empty.json").write_text(json.dumps(content))
    overrides = [f"dataloader.test.dataset.json={tmp_path / 'empty.json'}"]
    with pytest.raises(UserError, match="no labelled box"):
        analyse(run=str(run), out=str(tmp_path / "out"), overrides=overrides)


def test_only_an_earlier_analysis_is_replaced(tmp_path):
    def refused(out, message):
        with pytest.raises(UserError, match=message):
            analyse(run="none", out=str(out))

    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is a file")
    refused(tmp_path / "file" / "out", "is no folder")
    refused(tmp_path, r"is no earlier analysis \(it holds file\)")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "image_1.png").touch()
    refused(tmp_path / "pictures", r"is no earlier analysis \(it holds image_1.png\)")
    (tmp_path / "pictures" / "analysis.json").touch()
    (tmp_path / "pictures" / "notes.txt").touch()
    refused(tmp_path / "pictures", r"is no earlier analysis \(it holds notes.txt\)")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no such folder: none")


def test_a_plain_student_fails_in_one_line_of_the_command(run, tmp_path, capsys):
    # That a config has a teacher is all that tells the two apart.
    shutil.copytree(run, tmp_path / "plain")
    config = tmp_path / "plain" / "config.yaml"
    config.write_text(config.read_text().replace("  student:", "  pupil:"))
    arguments = ["--run", str(tmp_path / "plain"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        command.main([*arguments, "--num-images", "2"])
    said = capsys.readouterr().err if stop.value.code == 1 else f"{stop.value}\n"
    assert said.startswith("error: --run: ") and said.count("\n") == 1
    assert "a run without a teacher" in said
    assert not (tmp_path / "out").exists()


def test_a_run_that_stopped_early_is_as_long_as_it_was(run, tmp_path):
    early = tmp_path / "early"
    shutil.copytree(run, early)
    summary = json.loads((early / "summary.json").read_text())
    (early / "summary.json").write_text(json.dumps(summary | {"iterations": 2}))
    length = trained_iterations(str(early), load_run(str(early)))
    found = find_checkpoints(str(early), max_iter=length, limit=9)
    assert [c.iteration for c in found] == sorted({c.iteration for c in found})
    assert found[-1].iteration == 2 and found[-1].path.endswith("model_final.pth")
    (early / "summary.json").unlink()
    assert trained_iterations(str(early), load_run(str(early))) == 4

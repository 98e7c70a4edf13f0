"""An ablation's differences over the test images, and whether they are settled."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import stats

from dfd.research.ablate import bootstrap
from dfd.research.ablate.bootstrap import average_precision, image_intervals
from dfd.research.ablate.cells import Cell
from dfd.research.ablate.estimates import (
    BETTER,
    DONE,
    UNSETTLED,
    WORSE,
    CellResult,
    Estimate,
    Outcome,
    compare,
    verdicts,
)
from dfd.research.ablate.folders import CellRun
from dfd.research.ablate.tables import explanation, result_table
from dfd.research.resampling import draw_images

CLASSES = ("disc", "box", "bar")
IMAGES = 12
PLACES = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5}


def make_truth(seed=0):
    """Objects of three classes, a crowd among them; image 3 has none, and none but image 5 bars."""
    rng = np.random.default_rng(seed)
    truth = {
        "info": {},
        "images": [{"id": 7 * i, "height": 300, "width": 300} for i in range(IMAGES)],
        "categories": [{"id": 2 * k + 1, "name": name} for k, name in enumerate(CLASSES)],
        "annotations": [],
    }
    for i in range(IMAGES):
        for _ in range(0 if i == 3 else rng.integers(1, 6)):
            side = float(rng.choice([15, 60, 120]))
            x, y = rng.uniform(0, 150, 2)
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": 7 * i,
                    "category_id": 5 if i == 5 else int(rng.choice([1, 3])),
                    "bbox": [x, y, side, side],
                    "area": side * side,
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
    return truth


def make_detections(truth, seed):
    """Objects that are found more or less, and false ones.

    Scores are equal in different images, but not in one: the detections of an image that is there
    twice would alternate then, and AP depends on the order of equal scores.
    """
    rng = np.random.default_rng(seed)
    scores = {image["id"]: list(rng.permutation(30) / 30) for image in truth["images"]}
    found = []
    for annotation in truth["annotations"]:
        box = (np.array(annotation["bbox"]) + rng.normal(0, 0.08 * annotation["bbox"][2], 4)).clip(
            1
        )
        for shift in (0, 40):
            found.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": annotation["category_id"],
                    "bbox": [*(box[:2] + shift), *box[2:]],
                    "score": float(scores[annotation["image_id"]].pop()),
                }
            )
    return found


def evaluated(truth, detections):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def coco_ap(evaluation, metric):
    if metric in PLACES:
        return 100 * evaluation.stats[PLACES[metric]]
    precision = evaluation.eval["precision"][:, :, CLASSES.index(metric[3:]), 0, -1]
    return 100 * precision[precision > -1].mean()


def repeated(truth, detections, weights):
    """The same with each image there as often as its weight says."""
    more, found = copy.deepcopy(truth), []
    more["images"], more["annotations"] = [], []
    for i, image in enumerate(truth["images"]):
        for _ in range(weights[i]):
            new = len(more["images"]) + 1
            more["images"].append({**image, "id": new})
            for a in truth["annotations"]:
                if a["image_id"] == image["id"]:
                    n = len(more["annotations"]) + 1
                    more["annotations"].append({**a, "id": n, "image_id": new})
            found += [{**d, "image_id": new} for d in detections if d["image_id"] == image["id"]]
    return more, found


@pytest.mark.parametrize("metric", [*PLACES, "AP-box", "AP-bar"])
@pytest.mark.parametrize("chunk", [1, bootstrap._CHUNK])
def test_weighted_ap_is_coco_s_of_repeated_images(metric, chunk, monkeypatch):
    monkeypatch.setattr(bootstrap, "_CHUNK", chunk)
    truth = make_truth()
    detections = make_detections(truth, 1)
    matches = bootstrap._matches(evaluated(truth, detections), metric, CLASSES)
    weights = draw_images(IMAGES, 6)
    weights[0] = 1
    weights[1, 5] = 0  # The only image with bars.
    values = average_precision(matches, weights)
    for row, value in zip(weights, values, strict=True):
        expected = coco_ap(evaluated(*repeated(truth, detections, row)), metric)
        if metric == "AP-bar" and row[5] == 0:
            assert np.isnan(value)
        else:
            assert value == pytest.approx(expected, abs=1e-6)


def test_draws_are_of_as_many_images_and_repeat():
    weights = draw_images(50, 400)
    assert weights.shape == (400, 50) and (weights.sum(axis=1) == 50).all()
    assert weights.mean() == 1 and (weights > 1).any() and (weights == 0).any()
    assert (weights == draw_images(50, 400)).all()


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Two cells over two seeds, with detections in their folders and what those score."""
    truth = make_truth()
    truth["categories"].reverse()  # In a json of any order; COCOeval goes by the ids.

    def evaluator(dataset):
        assert dataset == "toy"
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = truth
            coco.createIndex()
        return type("Evaluator", (), {"truth": coco})

    monkeypatch.setattr(bootstrap, "build_evaluator", evaluator)
    settings = {"dataloader": {"test": {"dataset": "toy"}}}
    outcomes = []
    for k, cell in enumerate([Cell("a", (), {}), Cell("b", (), {})]):
        for seed in (0, 1):
            run = CellRun(cell, seed, tmp_path, settings)
            detections = make_detections(truth, 10 * k + seed)
            (run.folder / "inference").mkdir(parents=True)
            file = run.folder / "inference" / bootstrap.PREDICTIONS
            file.write_text(json.dumps(detections))
            evaluation = evaluated(truth, detections)
            scores = {metric: coco_ap(evaluation, metric) for metric in ("AP", "AP-disc")}
            outcomes.append(Outcome(run, DONE, {"results": {"bbox": scores}}))
    return outcomes


def intervals(outcomes, draws=200, metric="AP"):
    cells = [outcomes[0].run.cell, outcomes[-1].run.cell]
    results = compare(outcomes, cells, baseline=cells[0], metric=metric)
    found, reason = image_intervals(outcomes, results, baseline="a", metric=metric, draws=draws)
    return results, found, reason


def test_interval_is_of_the_mean_difference_on_the_same_images(finished):
    results, found, reason = intervals(finished)
    assert reason == "" and list(found) == ["b"]
    weights = draw_images(IMAGES, 200)
    reader = bootstrap.RunMatches("AP")
    a0, a1, b0, b1 = (average_precision(reader.read(o), weights) for o in finished)
    low, high = np.percentile((b0 - a0 + b1 - a1) / 2, [2.5, 97.5])
    assert found["b"] == pytest.approx((low, high))
    assert low < results[1].difference.mean < high
    # The same images for both: drawn apart, a difference of nothing would have an interval.
    same = [*finished[:2], *(Outcome(o.run, DONE, o.summary) for o in finished[2:])]
    for own, other in zip(same[2:], finished[:2], strict=True):
        file = own.run.folder / "inference" / bootstrap.PREDICTIONS
        file.write_text((other.run.folder / "inference" / bootstrap.PREDICTIONS).read_text())
        own.summary["results"] = other.summary["results"]
    assert intervals(same)[1] == {"b": (0.0, 0.0)}


def test_interval_of_one_class(finished):
    results, found, reason = intervals(finished, metric="AP-disc")
    assert reason == ""
    low, high = found["b"]
    assert low < results[1].difference.mean < high


def test_table_has_the_interval_and_says_what_it_is(finished):
    results, found, _ = intervals(finished)
    rows = result_table(results, metric="AP", over_images=found)
    assert rows[0][-3:] == ["over images", "wins", "verdict"]
    assert rows[1][-3:] == ["–", "–", "–"]
    assert rows[2][-3] == "{:+.2f} to {:+.2f}".format(*found["b"])
    assert all(len(row) == len(rows[0]) for row in rows)
    text = explanation(baseline="a", metric="AP", draws=200)
    assert "(paired bootstrap, 200 draws)" in text
    assert "bootstrap" not in explanation(baseline="a", metric="AP")


def test_run_that_found_nothing_has_an_ap_of_0(finished):
    for outcome in finished[2:]:
        (outcome.run.folder / "inference" / bootstrap.PREDICTIONS).write_text("[]")
        outcome.summary["results"]["bbox"]["AP"] = 0.0
    _, found, reason = intervals(finished)
    assert reason == "" and found["b"][1] < 0


def no_detections(outcome):
    (outcome.run.folder / "inference" / bootstrap.PREDICTIONS).unlink()


def other_data(outcome):
    outcome.summary["results"]["bbox"]["AP"] += 0.1


@pytest.mark.parametrize(
    ("damage", "message"),
    [(no_detections, "b, seed 1 kept no detections"), (other_data, "test data have changed")],
)
def test_without_the_detections_of_a_run_there_is_no_interval(finished, damage, message):
    damage(finished[-1])
    results, found, reason = intervals(finished)
    assert found == {} and message in reason
    assert "over images" not in result_table(results, metric="AP", over_images=found)[0]


def test_no_draws_need_no_detections(finished):
    no_detections(finished[-1])
    assert intervals(finished, draws=0)[1:] == ({}, "")


def results_of(**differences):
    made = [CellResult(Cell("base", (), {}), {}, {}, None)]
    for name, values in differences.items():
        made.append(CellResult(Cell(name, (), {}), {}, {}, dict(enumerate(values))))
    return made


def with_p(p_value, n=5):
    """Differences of which Student's t gives this p."""
    values = np.linspace(-1, 1, n)
    t = stats.t.isf(p_value / 2, n - 1)
    return list(values + t * values.std(ddof=1) / n**0.5)


def test_verdicts_are_by_holm():
    assert Estimate.of(with_p(0.02)).p_value == pytest.approx(0.02)
    # 0.02 alone is settled; beside two others it must be below 0.05 / 3.
    assert verdicts(results_of(a=with_p(0.02))) == {"a": BETTER}
    three = verdicts(results_of(a=with_p(0.02), b=with_p(0.5), c=with_p(0.6)))
    assert set(three.values()) == {UNSETTLED}
    # The smallest passes 0.05 / 3, so the next is held to 0.05 / 2.
    step = verdicts(results_of(a=with_p(0.02), b=[-x for x in with_p(0.01)], c=with_p(0.6)))
    assert step == {"a": BETTER, "b": WORSE, "c": UNSETTLED}
    # One that is not settled ends it, whatever comes after.
    assert verdicts(results_of(a=with_p(0.04), b=with_p(0.045)))["b"] == UNSETTLED
    assert verdicts(results_of(a=[1.0], b=[])) == {}
    # Without any spread nothing tells how much of it is chance.
    assert verdicts(results_of(a=[1.0, 1.0], b=[0.0, 0.0])) == {"a": UNSETTLED, "b": UNSETTLED}


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_visible_difference_is_seen_in_four_of_five_experiments(n):
    estimate = Estimate.of([0.3, -0.4, 0.9, 0.1, -0.9, 0.5, 0.2, -0.6, 0.4, -0.5][:n])
    rng = np.random.default_rng(0)
    draws = rng.normal(estimate.visible, estimate.sd, (20000, n))
    seen = (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean()
    assert seen == pytest.approx(0.8, abs=0.01)
    assert Estimate.of([0.0, 0.0]).visible is None  # Nothing to estimate it from.


def test_table_gives_the_verdict(tmp_path):
    cells = [Cell("a", (), {}), Cell("b", (), {}), Cell("c", (), {})]
    aps = {"a": [10.0, 11.0, 12.0], "b": [15.0, 16.1, 17.0], "c": [9.0, 12.0, 13.0]}
    outcomes = [
        Outcome(CellRun(c, s, tmp_path, {}), DONE, {"results": {"bbox": {"AP": aps[c.name][s]}}})
        for c in cells
        for s in range(3)
    ]
    results = compare(outcomes, cells, baseline=cells[0], metric="AP")
    rows = result_table(results, metric="AP")
    visible = results[2].difference.visible
    assert [row[-1] for row in rows] == [
        "verdict",
        "–",
        BETTER,
        f"not settled (visible from {visible:.2f})",
    ]

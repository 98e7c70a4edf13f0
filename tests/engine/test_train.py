"""train_net.py from the command line: files, checkpoints, seeds."""

import glob
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from dfd.engine.config import load_config

ENV = os.environ | {"PYTHONPATH": "tests", "OMP_NUM_THREADS": "1"}


def command(config, *arguments):
    result = subprocess.run(
        [sys.executable, "train_net.py", "--config-file", config, *arguments],
        capture_output=True,
        text=True,
        env=ENV,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def read_metrics(folder):
    return [json.loads(line) for line in open(folder / "metrics.json")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data, configs):
    """A teacher, a plain student and a distilled student of four iterations each."""
    root = tmp_path_factory.mktemp("runs")
    out = {name: root / name for name in configs}
    command(configs["teacher"], *data, f"train.output_dir={out['teacher']}")
    command(configs["student"], *data, f"train.output_dir={out['student']}")
    command(
        configs["dfd"],
        *data,
        f"train.output_dir={out['dfd']}",
        f"model.teacher.checkpoint={out['teacher']}/model_final.pth",
        "model.head.criterion.lenient=context",
    )
    return out


def test_output_files_are_those_of_detectron2(runs):
    for folder in runs.values():
        names = set(os.listdir(folder))
        assert {
            "config.yaml",
            "log.txt",
            "metrics.json",
            "model_0000001.pth",
            "model_final.pth",
            "last_checkpoint",
            "summary.json",
        } <= names
        assert glob.glob(str(folder / "events.out.tfevents.*"))
        last = read_metrics(folder)[-1]
        assert {"bbox/AP", "bbox/AP50", "bbox/AP-disc"} <= set(last)


def test_metrics_tell_each_term_and_its_share(runs):
    first = read_metrics(runs["dfd"])[0]
    for level in ("p2", "p3", "p4", "p5", "p6"):
        for name in (
            f"loss_dfd_{level}",
            f"dfd/{level}/disparity",
            f"dfd/{level}/ratio",
            f"dfd/{level}/share_low",
            f"dfd/{level}/share_high",
            f"dfd/{level}/term_low",
            f"dfd/{level}/term_high",
        ):
            assert name in first
    assert "dfd/ratio" in first
    assert sorted(os.listdir(runs["dfd"] / "disparity")) == ["0000000.png", "0000004.png"]


def test_summary_holds_what_a_table_needs(runs):
    summary = json.loads((runs["dfd"] / "summary.json").read_text())
    assert summary["iterations"] == 4
    assert summary["train_images"] == 8
    assert summary["seconds_per_iteration"] > 0
    assert summary["peak_memory_mib"] > 100
    assert "AP" in summary["results"]["bbox"]
    student = json.loads((runs["student"] / "summary.json").read_text())
    assert summary["parameters"] == student["parameters"]
    assert len(summary["teacher"]["sha256"]) == 64


def test_saved_config_is_that_of_the_run(runs):
    cfg = load_config(str(runs["dfd"] / "config.yaml"))
    assert cfg.model.student.roi_heads.num_classes == 3
    assert cfg.model.teacher.model.roi_heads.num_classes == 3
    assert cfg.model.head.criterion.lenient == "context"


@pytest.mark.parametrize("checkpoint", ["model_0000001.pth", "model_final.pth"])
def test_whole_teacher_in_checkpoints(runs, checkpoint):
    content = torch.load(runs["dfd"] / checkpoint, weights_only=True)
    plain = torch.load(runs["student"] / checkpoint, weights_only=True)
    assert list(content["model"]) == list(plain["model"])
    assert any("criteria" in key for key in content["head"])
    assert content["class_names"] == ["disc", "box", "bar"]


STOCK = textwrap.dedent("""
    import sys, torch
    from toys import faster_rcnn_config, make_batch
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import instantiate
    model = instantiate(faster_rcnn_config()).eval()
    model.roi_heads.box_predictor.test_score_thresh = 0.0
    incompatible = []
    checkpointer = DetectionCheckpointer(model)
    checkpointer._log_incompatible_keys = incompatible.append
    checkpointer.load(sys.argv[1])
    assert not any(x for i in incompatible for x in i), incompatible
    with torch.no_grad():
        found = [x["instances"] for x in model(make_batch())]
    torch.save([(x.pred_boxes.tensor, x.scores, x.pred_classes) for x in found], sys.argv[2])
    assert not any(name.split(".")[0] == "dfd" for name in sys.modules)
""")


def test_stock_detectron2_loads_the_student_and_predicts_the_same(runs, tmp_path):
    from detectron2.config import instantiate
    from toys import make_batch

    from dfd.weights import load_strict, read_weights

    checkpoint = str(runs["dfd"] / "model_final.pth")
    subprocess.run(
        [sys.executable, "-c", STOCK, checkpoint, str(tmp_path / "found.pt")],
        env=ENV,
        check=True,
    )
    cfg = load_config(str(runs["dfd"] / "config.yaml"))
    model = instantiate(cfg.model).eval()
    load_strict(model.student, read_weights(checkpoint, "checkpoint"), "checkpoint")
    model.student.roi_heads.box_predictor.test_score_thresh = 0.0
    with torch.no_grad():
        ours = [x["instances"] for x in model(make_batch())]
    stock = torch.load(tmp_path / "found.pt")
    assert sum(len(x) for x in ours) > 0
    for a, (boxes, scores, classes) in zip(ours, stock, strict=True):
        torch.testing.assert_close(a.pred_boxes.tensor, boxes)
        torch.testing.assert_close(a.scores, scores)
        assert torch.equal(a.pred_classes, classes)


def test_plain_and_distilled_run_of_one_seed_begin_alike(runs):
    """Same initial weights, same images, same sampling: only the distillation differs."""
    plain, distilled = (read_metrics(runs[name])[0] for name in ("student", "dfd"))
    for name in ("loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"):
        assert plain[name] == pytest.approx(distilled[name], rel=1e-5), name


def test_same_seed_same_run(runs, data, configs, tmp_path):
    command(configs["student"], *data, f"train.output_dir={tmp_path}", "train.max_iter=4")
    again = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    before = torch.load(runs["student"] / "model_final.pth", weights_only=True)["model"]
    for key, value in before.items():
        assert torch.equal(value, again[key]), key


def test_adapter_and_generator_moved(runs):
    first = torch.load(runs["dfd"] / "model_0000001.pth", weights_only=True)["head"]
    last = torch.load(runs["dfd"] / "model_final.pth", weights_only=True)["head"]
    assert set(first) == set(last)
    for key in first:
        assert not torch.equal(first[key], last[key]), key


def test_resume_continues_at_the_next_iteration(runs, data, configs, tmp_path):
    shared = [*data, f"model.teacher.checkpoint={runs['teacher']}/model_final.pth"]
    command(configs["dfd"], *shared, f"train.output_dir={tmp_path}", "train.max_iter=2")
    command(configs["dfd"], "--resume", *shared, f"train.output_dir={tmp_path}")
    iterations = [line["iteration"] for line in read_metrics(tmp_path)]
    assert iterations[:4] == [0, 1, 2, 3] or set(range(4)) <= set(iterations)
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 3


def test_eval_only_gives_the_trained_ap_and_keeps_the_run(runs, data, configs):
    before = (runs["dfd"] / "config.yaml").read_bytes()
    result = command(
        configs["dfd"],
        "--eval-only",
        *data,
        f"train.output_dir={runs['dfd']}",
        f"train.init_checkpoint={runs['dfd']}/model_final.pth",
    )
    expected = read_metrics(runs["dfd"])[-1]["bbox/AP"]
    assert f"copypaste: {expected:.4f}" in result.stdout + result.stderr
    assert (runs["dfd"] / "config.yaml").read_bytes() == before

"""train_net.py from the command line: files, checkpoints, seeds."""

import glob
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from commands import ENV, command, run
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from forked import forked
from omegaconf import OmegaConf
from own_hooks import CountsSteps, SeesEvaluation
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import build, make_batch

from dfd import DFDHead, DistilledDetector, FrozenTeacher, UserError
from dfd.engine import evaluate, load_config, train
from dfd.engine.state.checkpoint import StudentCheckpointer
from dfd.engine.trainer import Trainer
from dfd.losses import DFDLoss
from dfd.weights.files import file_sha256

pytestmark = pytest.mark.slow


def read_metrics(folder):
    return [json.loads(line) for line in open(folder / "metrics.json")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data, configs):
    """A teacher, a plain student and a distilled student of four iterations each."""
    root = tmp_path_factory.mktemp("runs")
    out = {name: root / name for name in ("teacher", "student", "dfd")}
    result = command(configs["teacher"], *data, f"train.output_dir={out['teacher']}")
    assert result.returncode == 0, result.stderr[-3000:]
    # Eight images in batches of two.
    epoch = ["train.epochs=1", "train.max_iter=99"]
    run(configs["student"], *data, f"train.output_dir={out['student']}", *epoch)
    run(
        configs["dfd"],
        *data,
        f"train.output_dir={out['dfd']}",
        f"model.teacher.checkpoint={out['teacher']}/model_final.pth",
        "model.head.criterion.lenient=context",
        "train.eval_period=2",
        "train.disparity_images.period=2",
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


def test_pictures_and_scalars_reach_tensorboard(runs):
    assert sorted(os.listdir(runs["dfd"] / "disparity")) == [
        "0000000.png",
        "0000002.png",
        "0000004.png",
    ]
    events = EventAccumulator(str(runs["dfd"]), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("disparity")] == [0, 1, 3]
    assert len(events.Scalars("dfd/p3/disparity")) == 4
    assert len(events.Scalars("loss_dfd_p3")) == 4


def test_evaluation_during_training_does_not_end_it(runs):
    """Evaluated after the second iteration; the third would raise in eval mode."""
    lines = read_metrics(runs["dfd"])
    assert [line["iteration"] for line in lines if "bbox/AP" in line][0] == 1
    assert "loss_cls" in lines[2]


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
    assert cfg.model.head.criterion.scale == DFDLoss().scale  # The config does not name it.
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


def test_stock_detectron2_loads_the_student_and_predicts_the_same(tmp_path):
    """A student is trained here; its file predicts the same where there is no dfd."""
    head = DFDHead(criterion=DFDLoss())
    teacher = FrozenTeacher(model=build(seed=1), allow_random=True)
    model = DistilledDetector(student=build(), teacher=teacher, head=head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(model, [make_batch()] * 3, optimizer, device="cpu")
    before = model.student.state_dict()["backbone.fpn_output3.weight"].clone()
    trainer.train(0, 3)
    assert not torch.equal(before, model.student.state_dict()["backbone.fpn_output3.weight"])
    checkpointer = StudentCheckpointer(
        model.student, str(tmp_path), class_names=["a", "b", "c"], trainer=trainer, head=head
    )
    checkpointer.save("model")
    subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path / "model.pth"), str(tmp_path / "found.pt")],
        env=ENV,
        check=True,
    )
    model.eval()
    model.student.roi_heads.box_predictor.test_score_thresh = 0.0
    with torch.no_grad():
        ours = [x["instances"] for x in model(make_batch())]
    assert sum(len(x) for x in ours) > 0
    for a, (boxes, scores, classes) in zip(ours, torch.load(tmp_path / "found.pt"), strict=True):
        torch.testing.assert_close(a.pred_boxes.tensor, boxes)
        torch.testing.assert_close(a.scores, scores)
        assert torch.equal(a.pred_classes, classes)


def test_plain_and_distilled_run_of_one_seed_begin_alike(runs):
    """Same initial weights, same images, same sampling: only the distillation differs."""
    plain, distilled = (read_metrics(runs[name])[0] for name in ("student", "dfd"))
    for name in ("loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"):
        assert plain[name] == pytest.approx(distilled[name], rel=1e-5), name


def test_python_api_trains_what_the_command_trains(runs, data, configs, tmp_path):
    cfg = load_config(configs["student"], [*data, f"train.output_dir={tmp_path / 'a'}"])
    before = OmegaConf.to_container(cfg, resolve=False)
    results = train(cfg)
    assert OmegaConf.to_container(cfg, resolve=False) == before
    assert set(os.listdir(runs["student"])) - set(os.listdir(tmp_path / "a")) == {
        name for name in os.listdir(runs["student"]) if name.startswith("events")
    }
    assert results["bbox"]["AP"] == read_metrics(tmp_path / "a")[-1]["bbox/AP"]
    weights = torch.load(tmp_path / "a/model_final.pth", weights_only=True)["model"]
    expected = torch.load(runs["student"] / "model_final.pth", weights_only=True)["model"]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)

    log = (tmp_path / "a/log.txt").read_text()
    cfg.train.output_dir = str(tmp_path / "b")
    cfg.train.init_checkpoint = str(tmp_path / "a/model_final.pth")
    assert evaluate(cfg)["bbox"]["AP"] == results["bbox"]["AP"]
    assert "Environment" in (tmp_path / "b/log.txt").read_text()
    assert (tmp_path / "a/log.txt").read_text() == log


def test_python_api_resumes_and_tells_the_results_of_a_run_that_has_ended(data, configs, tmp_path):
    overrides = [*data, f"train.output_dir={tmp_path}", "train.checkpointer.period=1"]
    train(load_config(configs["student"], [*overrides, "train.max_iter=1"]))
    cfg = load_config(configs["student"], [*overrides, "train.max_iter=2"])
    with pytest.raises(UserError, match="already holds a run"):
        train(cfg)
    results = train(cfg, resume=True)
    assert [line["iteration"] for line in read_metrics(tmp_path)][-1] == 2
    assert train(cfg, resume=True)["bbox"]["AP"] == results["bbox"]["AP"]


def test_initial_weights_have_no_rows_of_other_classes(runs, data, configs, tmp_path):
    """Which would fit by their number: the same classes in another order, as here."""
    content = torch.load(runs["student"] / "model_final.pth", weights_only=True)
    turned = content | {"class_names": content["class_names"][::-1]}
    torch.save(turned, tmp_path / "turned.pth")
    found = {}
    turned["settings"] = turned["settings"] | {"model.pixel_mean.0": "123.675"}
    torch.save(turned, tmp_path / "turned.pth")
    for name, path in (("same", runs["student"] / "model_final.pth"), ("turned", "turned.pth")):
        out = tmp_path / name
        more = ["train.max_iter=1", "optimizer.lr=0", "train.eval_period=0"]
        more += [f"train.init_checkpoint={tmp_path / path}", f"train.output_dir={out}"]
        run(configs["student"], *data, *more)
        found[name] = torch.load(out / "model_final.pth", weights_only=True)["model"]
        told = "weights with a row for each class begin anew" in (out / "log.txt").read_text()
        assert told == (name == "turned")
        # Nor are its pixels those of the config.
        told = "the student begins with what was learnt on others" in (out / "log.txt").read_text()
        assert told == (name == "turned")
        start = json.loads((out / "summary.json").read_text())["start"]
        assert start["sha256"] == file_sha256(tmp_path / path)
    other = [k for k in found["same"] if not torch.equal(found["same"][k], found["turned"][k])]
    assert "roi_heads.box_predictor.cls_score.weight" in other
    assert all(key.startswith("roi_heads.box_predictor.") for key in other)


@pytest.mark.parametrize("call", [train, evaluate])
def test_python_api_raises_one_line_and_needs_no_default_in_the_config(configs, call):
    cfg = load_config(configs["student"], ["train.ema.decay=2"])
    with pytest.raises(UserError, match="train.ema.decay is 2: it must be above 0 and below 1"):
        call(cfg)
    del cfg.train["ema"]
    cfg.train.seed = "${absent.seed}"
    with pytest.raises(UserError, match="train.seed cannot be resolved") as error:
        call(cfg)
    assert "\n" not in str(error.value)


def test_users_hooks_run_before_the_writers_and_go_on_after_a_resume(runs, data, configs, tmp_path):
    shared = [*data, f"train.output_dir={tmp_path}", "train.eval_period=1"]
    cfg = load_config(configs["student"], [*shared, "train.max_iter=2"])
    cfg.train.hooks = [L(CountsSteps)(factor=2), L(SeesEvaluation)()]
    train(cfg)
    saved = load_config(str(tmp_path / "config.yaml"))
    assert [hook._target_ for hook in saved.train.hooks] == [
        "own_hooks.CountsSteps",
        "own_hooks.SeesEvaluation",
    ]
    run(str(tmp_path / "config.yaml"), "--resume", "train.max_iter=4")
    lines = {line["iteration"]: line for line in read_metrics(tmp_path)}
    assert lines[0]["scaled"] == pytest.approx(2 * lines[0]["total_loss"])
    for iteration in (0, 2):  # The last one is evaluated after its step.
        assert lines[iteration]["seen"] == lines[iteration]["bbox/AP"] + 1
    assert [lines[i]["steps"] for i in range(4)] == [1, 2, 3, 4]


def test_users_hook_that_only_looks_changes_no_weight(runs, data, configs, tmp_path):
    given = "train.hooks=[{_target_: own_hooks.CountsSteps, factor: 3}]"
    run(configs["student"], *data, f"train.output_dir={tmp_path}", given)
    assert read_metrics(tmp_path)[1]["steps"] == 2
    weights = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    expected = torch.load(runs["student"] / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("hooks", "seen"),
    [
        ("3", "train.hooks is 3; it must be a list of calls"),
        ("null", "train.hooks is None; it must be a list of calls"),
        ("[3]", "train.hooks.0 is 3; it must be a call"),
        ("[{factor: 2}]", "train.hooks.0 is {'factor': 2}; it must be a call"),
        ("[{_target_: own_hooks.no_hook}]", "train.hooks.0 is a int: it must be a hook"),
        ("[{_target_: own_hooks.Absent}]", "train.hooks.0 cannot be built"),
        (
            "[{_target_: own_hooks.CountsSteps}]",
            "train.hooks.0 cannot be built: own_hooks.CountsSteps: ",
        ),
        (
            "[{_target_: own_hooks.SeesEvaluation}, {_target_: own_hooks.CannotBeMade}]",
            "train.hooks.1 cannot be built: own_hooks.CannotBeMade: no such camera",
        ),
        (
            "[{_target_: own_hooks.FailsInAStep}]",
            "train.hooks.0 failed in FailsInAStep.after_step: ZeroDivisionError: ",
        ),
    ],
)
def test_wrong_hook_is_one_line(data, configs, tmp_path, capsys, hooks, seen):
    with pytest.raises(SystemExit) as stop:
        run(configs["student"], *data, f"train.output_dir={tmp_path}", f"train.hooks={hooks}")
    assert stop.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"error: {seen}"), lines[-1]
    assert sum(line.startswith("error: ") for line in lines) == 1


def test_adapter_and_generator_moved(runs):
    first = torch.load(runs["dfd"] / "model_0000001.pth", weights_only=True)["head"]
    last = torch.load(runs["dfd"] / "model_final.pth", weights_only=True)["head"]
    assert set(first) == set(last)
    for key in first:
        assert not torch.equal(first[key], last[key]), key


def test_resume_continues_and_does_not_inherit_again(runs, data, configs, tmp_path, caplog):
    shared = [
        *data,
        f"model.teacher.checkpoint={runs['teacher']}/model_final.pth",
        "model.inherit=[backbone.bottom_up.]",
        f"train.output_dir={tmp_path}",
    ]
    run(configs["dfd"], *shared, "train.max_iter=2")
    run(configs["dfd"], "--resume", *shared)
    assert caplog.text.count("Inherited from the teacher") == 1
    assert {line["iteration"] for line in read_metrics(tmp_path)} >= {0, 1, 2, 3}
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 3

    summary = (tmp_path / "summary.json").read_bytes()
    run(configs["dfd"], "--resume", *shared)
    assert (tmp_path / "summary.json").read_bytes() == summary


def test_inheritance_comes_after_the_initial_weights(runs, data, configs, tmp_path):
    run(
        configs["dfd"],
        *data,
        f"model.teacher.checkpoint={runs['teacher']}/model_final.pth",
        f"train.init_checkpoint='{runs['student']}/model_final.pth?matching_heuristics=True'",
        "model.inherit=[backbone.bottom_up.]",
        "train.max_iter=1",
        "optimizer.lr=0",
        f"train.output_dir={tmp_path}",
    )
    weights, teacher, student = (
        torch.load(folder / "model_final.pth", weights_only=True)["model"]
        for folder in (tmp_path, runs["teacher"], runs["student"])
    )
    key = "backbone.bottom_up.res2.0.conv1.weight"
    assert torch.equal(weights[key], teacher[key])
    key = "roi_heads.box_head.fc1.weight"
    assert torch.equal(weights[key], student[key])


def test_teacher_of_more_classes_teaches_features_and_what_has_none(
    runs, data, configs, tmp_path, caplog, capsys
):
    """By the recipe of docs/detectors.md: as a detector of 80 classes would."""
    names = ["a", "b", "c", "d", "e"]
    model = OmegaConf.create(load_config(configs["teacher"]).model)
    model.roi_heads.num_classes = len(names)
    checkpoint = tmp_path / "more.pth"
    torch.save({"model": instantiate(model).state_dict(), "class_names": names}, checkpoint)
    more = [
        f"model.teacher.checkpoint={checkpoint}",
        f"model.teacher.model.roi_heads.num_classes={len(names)}",
    ]
    allowed = "model.teacher.check_classes=False"
    with pytest.raises(SystemExit):
        run(configs["dfd"], *data, *more, f"train.output_dir={tmp_path / 'refused'}")
    assert "the teacher has 5 classes, the data 3" in capsys.readouterr().err
    inherit = "model.inherit=[proposal_generator,heads]"
    out = tmp_path / "out"
    settings = [allowed, inherit, "train.max_iter=1", f"train.output_dir={out}"]
    run(configs["dfd"], *data, *more, *settings)
    assert "roi_heads.box_predictor.cls_score.weight: shape (4, " in caplog.text  # Not inherited.
    assert any(key.startswith("loss_dfd_p") for line in read_metrics(out) for key in line)
    assert json.loads((out / "summary.json").read_text())["teacher"]["sha256"]


def test_what_is_annealed_over_the_run_knows_its_length(
    runs, data, configs, tmp_path, monkeypatch
):
    seen, leniency = [], DFDLoss._leniency
    monkeypatch.setattr(
        DFDLoss, "_leniency", lambda self, level: seen.append(leniency(self, level)) or seen[-1]
    )
    shared = [*data, f"model.teacher.checkpoint={runs['teacher']}/model_final.pth"]
    shared += ["model.head.criterion.leniency=[0,1]"]
    run(configs["dfd"], *shared, "train.max_iter=4", f"train.output_dir={tmp_path}")
    levels = len(seen) // 4
    assert levels >= 4 and seen == [i / 4 for i in range(4) for _ in range(levels)]


def test_eval_only_gives_the_trained_ap_and_keeps_the_run(runs, data, configs, caplog):
    before = (runs["dfd"] / "config.yaml").read_bytes()
    run(
        configs["dfd"],
        "--eval-only",
        *data,
        f"train.output_dir={runs['dfd']}",
        f"train.init_checkpoint={runs['dfd']}/model_final.pth",
    )
    expected = read_metrics(runs["dfd"])[-1]["bbox/AP"]
    assert f"copypaste: {expected:.4f}" in caplog.text
    assert (runs["dfd"] / "config.yaml").read_bytes() == before


def test_two_processes_train_evaluate_and_agree_on_the_end(runs, data, configs, tmp_path):
    """Warm-up, distillation and the time after it, with no parameter unused."""
    result = command(
        configs["dfd"],
        "--num-gpus=2",
        *data,
        f"model.teacher.checkpoint={runs['teacher']}/model_final.pth",
        "model.head.adapter=conv1x1",
        # DDP tells of a parameter without a gradient in the step after: two lie beyond the end.
        "model.head.warmup_iters=1",
        "model.head.end_iter=2",
        f"train.output_dir={tmp_path}",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = read_metrics(tmp_path)
    assert "loss_dfd_p3" in lines[1] and "loss_dfd_p3" not in lines[2]
    assert "bbox/AP" in lines[-1]


def test_error_under_two_processes_is_one_line(data, configs, tmp_path):
    result = forked(configs["dfd"], "--num-gpus=2", *data, f"train.output_dir={tmp_path}")
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "model.teacher.checkpoint is empty" in errors[0]
    assert "Traceback" not in result.stderr

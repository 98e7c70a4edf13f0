"""How good the teacher is: --eval-teacher, train.eval_teacher_first, train.min_teacher_ap."""

import json

import pytest
import torch
from commands import run
from forked import forked
from omegaconf import OmegaConf
from toys import build, make_batch

from dfd import FrozenTeacher
from dfd.engine import evaluation as evaluate

# They depend on the step and the process; all other metrics on the run alone.
_TIMES = ("time", "data_time", "eta_seconds", "peak_memory_mib", "rank_data_time")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, data, configs):
    """The checkpoint of a teacher that takes RGB images and has learnt for a few iterations."""
    folder = tmp_path_factory.mktemp("teacher")
    run(
        configs["teacher"],
        *data,
        "model.input_format=RGB",
        "model.pixel_mean=[123.7,116.3,103.5]",
        "dataloader.train.mapper.image_format=RGB",
        "train.max_iter=6",
        "optimizer.lr=0.01",
        f"train.output_dir={folder}",
    )
    return str(folder / "model_final.pth")


@pytest.fixture(scope="module")
def given(teacher, data):
    """Overrides of a distilled run whose student takes BGR images."""
    return [
        *data,
        f"model.teacher.checkpoint={teacher}",
        "model.teacher.model.input_format=RGB",
        "model.teacher.model.pixel_mean=[123.7,116.3,103.5]",
    ]


def error(capsys, config, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(config, *arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


def results(caplog):
    """The last results that were printed, of every kind of AP."""
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("copypaste: ")][
        -1:
    ]
    return line


def metrics(folder):
    lines = [json.loads(line) for line in open(folder / "metrics.json")]
    return [{k: v for k, v in line.items() if k not in _TIMES} for line in lines]


@pytest.fixture
def measurements(monkeypatch):
    """A list that grows with every evaluation of a teacher."""
    calls, original = [], evaluate.evaluate_teacher

    def counted(*arguments):
        calls.append(original(*arguments))
        return calls[-1]

    monkeypatch.setattr(evaluate, "evaluate_teacher", counted)
    return calls


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_teacher_detects_in_its_own_channel_order(kind):
    model = build(kind, seed=1)
    model.input_format, model.pixel_mean = "RGB", model.pixel_mean.flip(0)
    scores = model if kind == "retinanet" else model.roi_heads.box_predictor
    scores.test_score_thresh = 0.0
    teacher = FrozenTeacher(model=model, allow_random=True, precision="bf16")
    batch = make_batch()
    turned = [{**item, "image": item["image"].flip(0)} for item in batch]
    teacher(batch, input_format="BGR")  # A low-precision pass must not touch the detector.
    with torch.no_grad():
        expected = model.eval()(turned)
    found = teacher.detect(batch, input_format="BGR")
    assert sum(len(x["instances"]) for x in expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours["instances"].scores, theirs["instances"].scores)
        boxes = [x["instances"].pred_boxes.tensor for x in (ours, theirs)]
        torch.testing.assert_close(*boxes)
    other = teacher.detect(batch, input_format="RGB")
    assert not all(
        len(a["instances"]) == len(b["instances"])
        and torch.equal(a["instances"].scores, b["instances"].scores)
        for a, b in zip(found, other, strict=True)
    )


def test_eval_teacher_prints_what_the_teachers_own_config_does(
    given, data, teacher, configs, caplog, tmp_path
):
    out = f"train.output_dir={tmp_path}"
    run(
        configs["teacher"],
        "--eval-only",
        *data,
        "model.input_format=RGB",
        "model.pixel_mean=[123.7,116.3,103.5]",
        "dataloader.train.mapper.image_format=RGB",
        f"train.init_checkpoint={teacher}",
        out,
    )
    expected = results(caplog)
    assert max(float(x) for x in expected.removeprefix("copypaste: ").split(",")) > 0
    caplog.clear()
    run(configs["dfd"], "--eval-teacher", *given, out)
    assert results(caplog) == expected
    assert not list(tmp_path.glob("*.pth"))


def test_eval_teacher_needs_a_teacher(data, configs, capsys, tmp_path):
    line = error(
        capsys, configs["student"], "--eval-teacher", *data, f"train.output_dir={tmp_path}"
    )
    assert "the config has no model.teacher" in line


@pytest.mark.parametrize(
    ("names", "count", "named"),
    [(list("ab"), 2, "has 2 classes, the test data 3"), (list("abc"), 3, "its classes are ['a',")],
)
def test_teacher_of_other_classes_is_not_evaluated(
    given, configs, capsys, tmp_path, names, count, named
):
    arguments = [
        *given,
        "model.teacher.checkpoint=''",
        "model.teacher.allow_random=True",
        "model.teacher.check_classes=False",
        f"model.teacher.model.roi_heads.num_classes={count}",
        f"model.teacher.class_names=[{','.join(names)}]",
        f"train.output_dir={tmp_path}",
    ]
    assert named in error(capsys, configs["dfd"], "--eval-teacher", *arguments)


@pytest.mark.slow
def test_measuring_the_teacher_changes_nothing_in_the_run(given, configs, measurements, tmp_path):
    """And a resumed run measures nothing anew, but its summary tells what was measured."""
    for name in ("plain", "measured", "resumed"):
        shared = [*given, f"train.output_dir={tmp_path / name}"]
        if name == "plain":
            run(configs["dfd"], *shared)
            continue
        shared += ["train.eval_teacher_first=True"]
        if name == "resumed":
            run(configs["dfd"], *shared, "train.max_iter=2")
            shared = ["--resume", *shared]
        run(configs["dfd"], *shared)
    assert len(measurements) == 2
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "measured")
    summaries = {
        name: json.loads((tmp_path / name / "summary.json").read_text())["teacher"]
        for name in ("plain", "measured", "resumed")
    }
    assert set(summaries["plain"]) == {"path", "sha256"}
    for name in ("measured", "resumed"):
        for key, value in measurements[0]["bbox"].items():
            assert summaries[name][key] == pytest.approx(value, nan_ok=True), key
        assert summaries[name]["sha256"] == summaries["plain"]["sha256"]


def random_teacher(data):
    return [*data, "model.teacher.checkpoint=''", "model.teacher.allow_random=True"]


def test_random_teacher_unnoticed(data, configs, capsys, tmp_path):
    line = error(
        capsys,
        configs["dfd"],
        *random_teacher(data),
        "train.min_teacher_ap=30",
        f"train.output_dir={tmp_path}",
    )
    assert "the teacher's AP on the test data is 0." in line
    assert "below train.min_teacher_ap=30" in line
    assert not list(tmp_path.glob("*.pth"))
    assert not (tmp_path / "metrics.json").exists()
    assert not (tmp_path / "config.yaml").exists()


def test_good_teacher_passes_and_the_bound_holds_after_a_resume(
    given, configs, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(
        evaluate, "evaluate_teacher", lambda *_: {"bbox": {"AP": 35.0, "AP50": 50.0}}
    )
    shared = [*given, "train.min_teacher_ap=35", f"train.output_dir={tmp_path}"]
    run(configs["dfd"], *shared, "train.max_iter=2")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["teacher"]["AP"] == 35.0
    line = error(capsys, configs["dfd"], "--resume", *shared, "train.min_teacher_ap=36")
    assert "is 35.00, below train.min_teacher_ap=36" in line


def test_ap_that_is_no_number_does_not_pass(given, configs, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "evaluate_teacher", lambda *_: {"bbox": {"AP": float("nan")}})
    line = error(
        capsys,
        configs["dfd"],
        *given,
        "train.min_teacher_ap=1",
        f"train.output_dir={tmp_path}",
    )
    assert "is nan, below" in line


def test_bound_given_as_a_fraction_is_refused(given, configs, capsys, tmp_path):
    """It would let almost any teacher pass."""
    arguments = [*given, "train.min_teacher_ap=0.3", f"train.output_dir={tmp_path}"]
    assert "it is in percent, from 1 to 100" in error(capsys, configs["dfd"], *arguments)


@pytest.mark.slow
def test_every_process_knows_the_teachers_ap(given, configs, tmp_path):
    """The evaluator gives it to the main one alone; the others would stop, or never notice."""
    result = forked(
        configs["dfd"],
        "--num-gpus=2",
        *given,
        "train.eval_teacher_first=True",
        "train.max_iter=1",
        f"train.output_dir={tmp_path}",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "AP" in json.loads((tmp_path / "summary.json").read_text())["teacher"]


@pytest.mark.parametrize(
    ("named", "part", "folder"),
    [(None, "", "kept"), (None, "ema", "kept"), ("own", "", "own"), ("own", "ema", "own/ema")],
)
def test_only_the_student_writes_to_the_folder_that_a_config_names(
    monkeypatch, named, part, folder
):
    """Or its detections would be those of its average, or of its teacher."""
    evaluation = "dfd.engine.evaluation"
    monkeypatch.setattr(f"{evaluation}.make", lambda node, where: node)
    to = f"{evaluation}.inference_on_dataset"
    monkeypatch.setattr(to, lambda *given: {"to": given[-1].output_dir})
    monkeypatch.setattr(f"{evaluation}.print_csv_format", lambda results: None)
    cfg = OmegaConf.create({"dataloader": {"test": [], "evaluator": {"output_dir": named}}})
    assert evaluate.test(cfg, len, "kept", part=part) == {"to": folder}
    assert cfg.dataloader.evaluator.output_dir == named

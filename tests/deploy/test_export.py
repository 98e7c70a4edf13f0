"""dfd export: what onnxruntime finds is what the student finds."""

import dataclasses
import errno
import json
import os
import shutil
import sys
from pathlib import Path

import detectron2.data.transforms as T
import numpy as np
import onnx
import pytest
import torch
import toys
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from omegaconf import OmegaConf
from PIL import Image
from reppoints_toys import small_detector
from torch import nn
from vit_toys import detectron2_vit_config, timm_vit_config

from dfd.deploy import benchmark, export, predict
from dfd.deploy.agreement import Agreement, compare
from dfd.deploy.onnx_model import OnnxModel
from dfd.deploy.program_model import ProgramModel, program_size
from dfd.deploy.student import Student, load_student
from dfd.engine.run_folder import RunFolder, load_runs
from dfd.errors import UserError
from dfd.modeling import YOLOX
from dfd.weights.files import file_sha256

DETECTORS = {
    **{kind: lambda kind=kind: toys.build(kind) for kind in toys.CONFIGS},
    "keypoint_rcnn": lambda: instantiate(toys.keypoint_rcnn_config()),
    "yolox": lambda: YOLOX(depth=0.33, width=0.125, num_classes=3, max_detections=50),
    "reppoints": small_detector,
    "vit": lambda: instantiate(timm_vit_config(img_size=96, square_pad=96)),
    "vit_relative": lambda: instantiate(detectron2_vit_config(square_pad=96)),
}
QUICK = ("faster_rcnn", "yolox")
# The layers that make scores, and those that make boxes.
SCORES = ("cls_score", "cls_out", "cls_preds", "obj_preds", "ctrness", "objectness_logits")
BOXES = ("bbox_pred", "reg_preds", "anchor_deltas", "pts_init_out", "pts_refine_out")


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    """To load a program takes seconds, and the same file is the same program."""
    load, loaded = torch.export.load, {}

    def cached(source, extra_files):
        content = Path(source).read_bytes() if isinstance(source, str) else source.getvalue()
        if content not in loaded:
            loaded[content] = load(source, extra_files=extra_files), dict(extra_files)
        program, told = loaded[content]
        extra_files.update(told)
        return program

    monkeypatch.setattr("torch.export.load", cached)


def confident(kind):
    """A detector with scores and boxes as spread as a trained one's, so that it finds much."""
    torch.manual_seed(0)
    model = DETECTORS[kind]().eval()
    layers = {
        layer: spread
        for name, layer in model.named_modules()
        for parts, spread in ((SCORES, 2.0), (BOXES, 0.5))
        if any(part in name for part in parts)
        if isinstance(layer, nn.Conv2d | nn.Linear)
    }
    seen = {layer: [] for layer in layers}
    # A copy, for what is made of the outputs is made in place.
    hooks = [
        layer.register_forward_hook(lambda m, _, out: seen[m].append(out.clone()))
        for layer in layers
    ]
    with torch.no_grad():
        for layer in layers:
            nn.init.normal_(layer.weight, std=0.001)
            nn.init.zeros_(layer.bias)
        model([{"image": student_of(model).pixels(pictures((64, 96))[0])}])
        for layer, spread in layers.items():
            outputs = torch.cat([out.flatten() for out in seen[layer]])
            layer.weight *= spread / outputs.std()
            layer.bias -= spread * outputs.mean() / outputs.std()
            layer.bias += kind == "fcos"  # Distances from a cell to the sides, above 0.
    for hook in hooks:
        hook.remove()
    return model


def student_of(model, size=64):
    augmentations = T.AugmentationList([T.ResizeShortestEdge(size, 96)])
    return Student(model, ["a", "b", "c"], augmentations, "BGR", [{"size": size}])


def pictures(*sizes, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@pytest.mark.parametrize(
    "kind",
    [
        *QUICK,
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in DETECTORS if kind not in QUICK),
    ],
)
def test_every_kind_of_detector_finds_the_same_at_every_size(kind, tmp_path, capsys):
    student = student_of(confident(kind))
    out = tmp_path / "student.onnx"
    images = pictures((64, 96), (50, 90), (90, 70), (40, 40))
    if kind == "reppoints" and sys.version_info < (3, 11):
        # The last onnxruntime for that Python has no deformable convolutions.
        with pytest.raises(UserError, match="onnxruntime cannot load it: .*DeformConv"):
            export.export(student, images, out)
        return
    agreement = export.export(student, images, out)
    assert agreement.detections > 20 and agreement.unmatched == 0
    assert agreement.boxes < 0.05 and agreement.scores < 1e-4
    # Read back, on sizes that it was not checked with.
    model = OnnxModel(str(out))
    again = compare(student, student.with_model(model), pictures((70, 80), (33, 95), seed=1))
    assert again.detections > 5 and again.unmatched == 0
    said, left_out = capsys.readouterr().out, {"mask_rcnn": "masks", "keypoint_rcnn": "keypoints"}
    told = [what for what in left_out.values() if f"{what} are left out" in said]
    assert told == [what for of, what in left_out.items() if of == kind]
    assert json.loads(model.metadata["classes"]) == ["a", "b", "c"]
    assert json.loads(model.metadata["augmentations"]) == [{"size": 64}]
    assert model.metadata["image_format"] == "BGR"
    assert [entry.version for entry in onnx.load(out).opset_import if not entry.domain] == [19]


@pytest.mark.slow
# Keypoints are left out of it as masks are, and the rest is the same.
@pytest.mark.parametrize("kind", [kind for kind in DETECTORS if kind != "keypoint_rcnn"])
def test_a_program_finds_the_same_at_its_size(kind, tmp_path):
    student = student_of(confident(kind))
    out = tmp_path / "student.pt2"
    images = pictures((64, 96), (50, 90), (90, 70))
    agreement = export.export(student, images, out, size=(60, 88))
    assert agreement.detections > 20 and agreement.unmatched == 0
    model = ProgramModel(str(out))
    assert model.metadata == {
        "classes": ["a", "b", "c"],
        "image_format": "BGR",
        "height": 60,
        "width": 88,
    }
    fixed = student.of_size(60, 88)
    again = compare(fixed, fixed.with_model(model), pictures((70, 80), seed=1))
    assert again.detections > 5 and again.unmatched == 0


def test_kinds_that_are_no_program_are_refused(tmp_path):
    model = confident("faster_rcnn")
    model.roi_heads = nn.Identity()
    with pytest.raises(UserError, match="GeneralizedRCNN with Identity is not exported to"):
        export.export(student_of(model), pictures((64, 96)), tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_program_of_no_detection_is_one(tmp_path):
    """Where nothing is above the threshold, nothing is suppressed and nothing fails."""
    for kind, setting in (("faster_rcnn", "test_score_thresh"), ("yolox", "score_thresh")):
        model = confident(kind)
        setattr(model.roi_heads.box_predictor if kind == "faster_rcnn" else model, setting, 0.9999)
        student = student_of(model)
        agreement = export.export(student, pictures((64, 96)), tmp_path / f"{kind}.pt2")
        assert agreement.detections == 0 and agreement.unmatched == 0


def test_a_graph_that_finds_otherwise_is_not_written(tmp_path, monkeypatch):
    student = student_of(confident("yolox"))

    class Moved(OnnxModel):
        @staticmethod
        def moved(results):
            results[0]["instances"].pred_boxes.tensor[0] += 3
            return results

        def __call__(self, batch):
            return self.moved(super().__call__(batch))

    class MovedProgram(ProgramModel):
        def __call__(self, batch):
            return Moved.moved(super().__call__(batch))

    monkeypatch.setattr(export, "OnnxModel", Moved)
    monkeypatch.setattr(export, "ProgramModel", MovedProgram)
    for name in ("x.onnx", "x.pt2"):
        with pytest.raises(UserError, match="gives other detections: 2 of .* is not written"):
            export.export(student, pictures((64, 96)), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_model_whose_python_looks_at_values_is_refused_with_the_reason(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, batch):
            raise RuntimeError("no tensors here")

    with pytest.raises(UserError, match="^Own cannot be exported: no tensors here$"):
        export.export(student_of(Own()), pictures((64, 96)), tmp_path / "x.onnx")


def test_a_vit_that_resamples_its_positions_to_any_size_is_refused(tmp_path, capfd):
    """Its graph would hold those of one size; nothing of it is printed."""
    model = instantiate(timm_vit_config(img_size=64))
    for sizes in (((64, 96),), ((64, 64), (64, 96))):
        with pytest.raises(UserError, match="GeneralizedRCNN cannot be exported|gives other|fails"):
            export.export(student_of(model.eval()), pictures(*sizes), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
    assert "graph" not in capfd.readouterr().out


def found(*rows):
    """Instances of (x0, score, class)."""
    x, scores, classes = zip(*rows, strict=True) if rows else ((), (), ())
    boxes = torch.tensor([[v, 0.0, v + 10.0, 10.0] for v in x]).reshape(-1, 4)
    return Instances(
        (50, 50),
        pred_boxes=Boxes(boxes),
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(classes, dtype=torch.int64),
    )


FIRST = found((0.0, 0.9, 0), (20.0, 0.5, 1), (5.0, 0.2, 1))


@pytest.mark.parametrize(
    ("second", "unmatched"),
    [
        (found((20.0, 0.5, 1), (0.1, 0.9, 0), (5.0, 0.2, 1)), 0),  # In another order.
        (found((0.0, 0.9, 0), (20.0, 0.5, 1)), 0),  # Without the lowest: at the threshold.
        (found((0.0, 0.9, 0), (5.0, 0.2, 1)), 1),
        (found((0.0, 0.9, 0), (20.0, 0.5, 0), (5.0, 0.2, 1)), 2),  # Of another class.
        (found((1.0, 0.9, 0), (20.0, 0.5, 1), (5.0, 0.2, 1)), 2),
        (found((0.0, 0.8, 0), (20.0, 0.5, 1), (5.0, 0.2, 1)), 2),
        (found(*[(0.0, 0.9, 0)] * 2, (20.0, 0.5, 1), (5.0, 0.2, 1)), 1),  # Found twice.
        (found(), 3),
    ],
)
def test_what_counts_as_the_same(second, unmatched):
    both = {0: FIRST, 1: second}
    assert compare(both.get, lambda _: second, [0]).unmatched == unmatched
    assert compare(lambda _: second, both.get, [0]).unmatched == unmatched
    assert compare(lambda _: found(), lambda _: found(), [0]).unmatched == 0


def test_scores_near_zero_do_not_excuse_each_other():
    rows = [(0.0, 0.0019, 0), (20.0, 0.0018, 0), (5.0, 0.0010, 0)]
    both = found(*rows), found(rows[0], (24.0, 0.0018, 0), rows[2])
    assert compare(lambda _: both[0], lambda _: both[1], [0]).unmatched == 2
    # What is at the threshold needs no equal here either.
    lowest = found(*rows, (35.0, 0.0010 * 1.005, 0))
    assert compare(lambda _: both[0], lambda _: lowest, [0]).unmatched == 0


def test_a_teacher_of_other_images_is_refused_at_the_start():
    teacher = {"checkpoint": "x.pth", "scale": {"_target_": "dfd.data.size_ratio"}}
    teacher["scale"] |= {"teacher": 128, "student": 64}
    cfg = OmegaConf.create({"model": {"student": {}, "teacher": teacher}})
    with pytest.raises(UserError, match="sees images of 2 times the .* give --no-teacher"):
        benchmark.check_teacher(RunFolder("run", "", cfg, {}, []))
    cfg.model.teacher.scale = 1.0
    benchmark.check_teacher(RunFolder("run", "", cfg, {}, []))


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "export_onnx", lambda *_: b"graph")
    monkeypatch.setattr(export, "OnnxModel", lambda _: None)
    monkeypatch.setattr(export, "compare", lambda *_: Agreement(1, 0, 0.0, 0.0))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="x.onnx cannot be written .No space left on device.: make"):
        export.export(student_of(None), pictures((64, 96)), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def call(finished, tmp_path, monkeypatch):
    """A command on the finished run, within a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for module in (export, predict, benchmark):
        monkeypatch.setattr(module, "stop_on_signals", lambda: None)
    return lambda module, *arguments: module.main(["--run", str(finished[0]), *map(str, arguments)])


@pytest.mark.slow
def test_three_commands_from_a_run_to_detections_in_onnxruntime(
    finished, call, capsys, monkeypatch
):
    call(export, "--out", "new/student.onnx", "--num-images", 2)
    assert "the same" in capsys.readouterr().out
    call(predict, finished[1], "--score", 0, "--no-images", "--out", "torch")
    exported = ["--exported", "new/student.onnx"]
    call(predict, finished[1], "--score", 0, "--no-images", "--out", "onnx", *exported)
    ours, theirs = (
        json.loads(Path(name, "detections.json").read_text())["annotations"]
        for name in ("torch", "onnx")
    )
    assert len(ours) == len(theirs) > 0
    np.testing.assert_allclose(
        sorted(a["bbox"] for a in ours), sorted(a["bbox"] for a in theirs), atol=0.05
    )
    call(export, "--out", "new/student.pt2", "--num-images", 1)
    program = ["--exported", "new/student.pt2"]
    call(predict, finished[1], "--score", 0, "--no-images", "--out", "program", *program)
    assert json.loads(Path("program", "detections.json").read_text())["annotations"]
    # A program takes one size alone, and the images here have two; they are three.
    shutil.copytree(finished[1], "photos")
    Image.new("RGB", (64, 100)).save("photos/tall.png")
    # Memory takes a process for each; that of the graph is measured below.
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "_memory_in_another_process", lambda *_: 1.0)
        call(benchmark, *program, "--no-teacher", "--repeats", 1, "--images", "photos")
    assert ", 4 images, 1 turns" in capsys.readouterr().out
    loaded = ProgramModel("new/student.pt2")
    told = loaded.metadata
    assert program_size("new/student.pt2") == (told["height"], told["width"])
    with pytest.raises(UserError, match="of 9 x 9 pixels, and the program is of"):
        loaded([{"image": torch.zeros(3, 9, 9, dtype=torch.uint8)}])
    options = ["--no-teacher", "--repeats", 1, "--num-images", 2, "--out", "a/b.json"]
    call(benchmark, *exported, *options)
    assert "exported" in capsys.readouterr().out
    student, file = json.loads(Path("a/b.json").read_text())["models"]
    assert (student["name"], file["name"]) == ("student", "exported")
    assert student["parameters"] > 1000 and student["gflops"] > 0 and file["parameters"] is None
    assert 4 * student["parameters"] / 2**20 <= student["weights_mib"] < file["weights_mib"] + 1
    for row in (student, file):
        assert 0 < row["latency_ms"] <= row["latency_p90_ms"]
        assert row["images_per_second"] > 0 and row["memory_mib"] > 0


@pytest.mark.slow
def test_the_guide_s_script_needs_neither_this_project_nor_torch(finished, call):
    call(export, "--out", "student.onnx", "--num-images", 1)
    image = sorted(finished[1].glob("*.[jp][pn]g"))[0]
    Image.open(image).convert("RGB").save("photo.jpg", quality=95)
    guide = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
    script, _, _ = guide.partition("```python\nimport json\n")[2].partition("```")
    assert "torch" not in script and "dfd" not in script
    found = {}
    exec("import json\n" + script, found)
    (run,) = load_runs({"run": str(finished[0])})
    theirs = load_student(run)(found["image"])
    assert found["boxes"].shape[1] == 4 and 0 < len(found["scores"]) <= 2 * len(theirs)
    assert found["boxes"].max() <= max(found["image"].shape) + 1
    # Beyond rounding and another way to resize, the best detection is the same one.
    assert found["classes"][0] in theirs.pred_classes[:5]


def test_a_file_of_another_run_is_told(finished, call, tmp_path):
    student = student_of(confident("yolox"))
    (tmp_path / "other.onnx").write_bytes(export.export_onnx(student, pictures((64, 96))[0]))
    with pytest.raises(SystemExit, match="other.onnx wants its images otherwise .* another run"):
        call(predict, finished[1], "--exported", "other.onnx", "--out", "out")


def test_a_file_of_another_run_of_the_same_config_is_refused(finished, tmp_path):
    (run,) = load_runs({"run": str(finished[0])})
    student = load_student(run, weights="model_ema.pth", device="cpu")
    ours, other = tmp_path / "ours.onnx", tmp_path / "other.onnx"
    ours.write_bytes(export.export_onnx(student, pictures((64, 80))[0]))
    load_student(run, exported=str(ours))
    graph = onnx.load(ours)
    told = {entry.key: entry for entry in graph.metadata_props}
    assert told["weights_sha256"].value == file_sha256(finished[0] / "model_ema.pth")
    told["weights_sha256"].value = "0123456789abcdef"
    onnx.save(graph, other)
    with pytest.raises(UserError, match="from weights .sha256 0123456789ab. that --run run does"):
        load_student(run, exported=str(other))
    # What is asked for by name is it or nothing.
    load_student(run, weights="model_ema.pth", exported=str(ours))
    with pytest.raises(UserError, match="exported from other weights .* than --weights model_best"):
        load_student(run, weights="model_best.pth", exported=str(ours))
    with pytest.raises(UserError, match="--weights: no such file: .*model_x.pth"):
        load_student(run, weights="model_x.pth", exported=str(ours))
    # One that an older version wrote tells its classes alone.
    graph.metadata_props.remove(told["weights_sha256"])
    onnx.save(graph, other)
    load_student(run, exported=str(other))
    told["classes"].value = '["cat", "dog", "cow"]'
    onnx.save(graph, other)
    with pytest.raises(UserError, match="has the classes .'cat', .* --run run .*of another run"):
        load_student(run, exported=str(other))


def test_a_file_of_weights_outside_the_run_is_used_where_these_are_named(finished, call, tmp_path):
    (run,) = load_runs({"run": str(finished[0])})
    weights = str(tmp_path / "model_000001.pth")
    torch.save(torch.load(finished[0] / "model_final.pth") | {"iteration": 7}, weights)
    student = load_student(run, weights=weights, device="cpu")
    (tmp_path / "x.onnx").write_bytes(export.export_onnx(student, pictures((64, 80))[0]))
    given = [finished[1], "--exported", "x.onnx", "--no-images"]
    with pytest.raises(SystemExit, match="or the file of those weights with --weights"):
        call(predict, *given, "--out", "out")
    call(predict, *given, "--out", "out", "--weights", weights)
    assert json.loads((tmp_path / "out" / "detections.json").read_text())["images"]


def test_a_program_of_another_run_of_the_same_config_is_refused(finished, tmp_path, monkeypatch):
    class Nothing(nn.Module):
        def forward(self, image):
            found = image.float().new_zeros(0)
            return found.reshape(0, 4), found, found.long()

    monkeypatch.setattr(export, "fixed_size", lambda *_: Nothing())
    (run,) = load_runs({"run": str(finished[0])})
    student, path = load_student(run, device="cpu"), tmp_path / "x.pt2"
    path.write_bytes(export.export_program(student, 60, 80))
    load_student(run, exported=str(path))
    student = dataclasses.replace(student, weights_sha256="0123456789abcdef")
    path.write_bytes(export.export_program(student, 60, 80))
    with pytest.raises(UserError, match="from weights .sha256 0123456789ab. that --run run does"):
        load_student(run, exported=str(path))


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (export, ["--out", "student.pt"], "--out student.pt: its name must end with .onnx or .pt2"),
        (export, ["--out", "x.onnx", "--size", "9", "9"], "--size 9 9: it must be two sides"),
        (export, ["--out", "x.pt2", "--size", "0", "9"], "--size 0 9: it must be two sides"),
        (benchmark, ["--exported", "there.pt2", "--no-teacher"], "there.pt2: it is no program of"),
        (benchmark, ["--exported", "nowhere.pt2"], "nowhere.pt2: no such file"),
        (export, ["--out", "there.onnx"], "--out there.onnx: it exists"),
        (export, ["--out", "x.onnx", "--num-images", "0"], "--num-images 0: it must be 1 or more"),
        (export, ["--out", "x.onnx", "--images", "nowhere"], "nowhere: no such file or folder"),
        (export, ["--out", "x.onnx", "--images", "text.jpg"], "none of the images can be read"),
        (export, ["--out", "x.onnx", "--weights", "no.pth"], "no.pth"),
        (benchmark, ["--exported", "nowhere.onnx"], "nowhere.onnx: no such file"),
        (benchmark, ["--exported", "there.onnx", "--no-teacher"], "onnxruntime cannot load it"),
        (benchmark, ["--repeats", "0"], "--repeats 0: it must be 1 or more"),
        (benchmark, ["--no-teacher", "--out", "there.onnx"], "--out there.onnx: it exists"),
        (benchmark, ["--out", "a.png/x/b.json"], "--out: folder a.png/x cannot be made"),
        (export, ["--out", "a.png/x/b.onnx"], "--out: folder a.png/x cannot be made"),
        (export, ["--out", "y" * 300 + ".onnx"], "yy.onnx: File name too long: choose another"),
        (benchmark, ["--out", "y" * 300, "--no-teacher"], "yy: File name too long"),
        (benchmark, ["--device", "gpu"], "--device gpu: Expected one of cpu, cuda"),
        (benchmark, [], "names no weights of a teacher: give --no-teacher"),
    ],
)
def test_bad_arguments_are_told_in_one_line(call, tmp_path, module, arguments, message):
    Path("there.onnx").write_text("kept")
    Path("there.pt2").write_text("no program")
    Path("text.jpg").write_text("no image")
    Image.new("RGB", (8, 8)).save("a.png")
    with pytest.raises(SystemExit) as stop:
        call(module, *arguments)
    assert str(stop.value.code).startswith("error: ") and message in str(stop.value.code)
    assert "\n" not in str(stop.value.code)
    assert not Path("x.onnx").exists() and Path("there.onnx").read_text() == "kept"


def test_packages_that_are_missing_are_named(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SystemExit, match="onnxruntime is not installed: pip install onnx onnx"):
        call(export, "--out", "x.onnx")

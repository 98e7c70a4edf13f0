"""train_net.py --dry-run: what it tells, what it stops, and that it leaves nothing."""

import json
import os
import signal
import socket
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch
from coco_files import write_coco
from commands import run
from detectron2.config import instantiate
from omegaconf import OmegaConf
from toys import faster_rcnn_config

from dfd.demo import generated_shapes
from dfd.engine.dry_run.sandbox import leaving_nothing

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NAME = "dfd.demo.generated_shapes"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.manual_seed(1)
    model = instantiate(faster_rcnn_config(channels=12))
    torch.save({"model": model.state_dict(), "class_names": ["disc", "box", "bar"]}, path)
    return f"model.teacher.checkpoint={path}"


def dry(capsys, config, *arguments):
    """What a dry run that finds nothing wrong prints, and its lines with single blanks."""
    capsys.readouterr()
    run(config, "--dry-run", *arguments)
    text = capsys.readouterr().out
    return text, [" ".join(line.split()) for line in text.splitlines()]


def refused(capsys, config, *arguments):
    """The one error line of a dry run that finds something wrong, and what it printed before."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(config, "--dry-run", *arguments)
    printed = capsys.readouterr()
    assert stop.value.code == 1
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    return line, printed.out


def content(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def section(text, title):
    return text.partition(f"\n{title}")[2].partition("\n\n")[0]


def test_table_tells_what_would_be_trained(capsys, configs, data, teacher, tmp_path):
    out = tmp_path / "out"
    text, lines = dry(
        capsys,
        configs["dfd"],
        *data,
        teacher,
        "model.inherit=[backbone.bottom_up.]",
        "model.head.warmup_iters=4",
        f"train.output_dir={out}",
    )
    assert not out.exists()
    assert any(line.startswith("train ") and line.endswith("8 8 16 0") for line in lines)
    assert any(line.startswith("test ") and line.endswith("3 3 6 0") for line in lines)
    assert "3 classes: disc, box, bar" in lines
    assert "p3 8 8 p3 8 12 Conv2d" in lines
    assert teacher.partition("=")[2] in section(text, "Teacher")
    assert "classes 3: disc, box, bar" in lines
    assert "tensors of the teacher (backbone.bottom_up.)" in section(text, "Weights")
    adapters = 5 * (8 * 12 + 12)
    assert f"distillation head {adapters} {adapters}" in lines
    assert "detector/decay" in section(text, "Optimizer: AdamW")
    losses = section(text, "Losses at iteration 0")
    for name in ("loss_cls", "loss_rpn_loc", "loss_dfd_p2", "loss_dfd_p6", "distillation's"):
        assert name in losses
    assert "model.head.weight is 1, at this iteration 0.25" in losses
    assert "every trainable parameter has one" in section(text, "Gradients")
    assert any(line.startswith("all 4 steps about 0 min") for line in lines)
    not_checked = section(text, "Not checked")
    for what in ("CUDA", "more than one process", "how good the teacher is", "8 of 8 training"):
        assert what in not_checked


def test_value_of_each_loss_is_that_of_the_first_iteration(
    capsys, configs, data, teacher, tmp_path
):
    _, lines = dry(capsys, configs["dfd"], *data, teacher, f"train.output_dir={tmp_path / 'a'}")
    run(configs["dfd"], *data, teacher, "train.max_iter=1", f"train.output_dir={tmp_path / 'b'}")
    first = json.loads((tmp_path / "b" / "metrics.json").read_text().splitlines()[0])
    shown = {
        words[0]: float(words[1])
        for words in (line.split() for line in lines)
        if words and words[0].startswith("loss_dfd_")
    }
    assert len(shown) == 5
    for name, value in shown.items():
        assert value == pytest.approx(first[name], rel=0.05, abs=1e-3), name


def test_plain_detector(capsys, configs, data, tmp_path):
    text, lines = dry(capsys, configs["student"], *data, f"train.output_dir={tmp_path / 'out'}")
    assert "none: a plain detector is trained" in lines
    assert "distillation" not in text
    assert any(line.startswith("the task's") for line in lines)
    assert not (tmp_path / "out").exists()


def test_folder_of_another_run_is_not_touched_and_a_start_would_be_refused(
    capsys, configs, data, teacher, tmp_path
):
    (tmp_path / "model_0000999.pth").write_text("precious")
    (tmp_path / "log.txt").write_text("precious")
    before = content(tmp_path)
    line, table = refused(capsys, configs["dfd"], *data, teacher, f"train.output_dir={tmp_path}")
    assert "a start would be refused" in line
    assert "already holds a run (model_0000999.pth)" in line
    assert "Not checked" in table
    assert content(tmp_path) == before


def test_resume_is_tried_without_touching_the_run(capsys, configs, data, teacher, tmp_path):
    shared = [*data, teacher, "train.log_period=2", f"train.output_dir={tmp_path}"]
    run(configs["dfd"], *shared, "train.max_iter=2")
    before = content(tmp_path)
    text, _ = dry(capsys, configs["dfd"], "--resume", *shared)
    assert "goes on at iteration 2" in section(text, "Weights")
    assert "Losses at iteration 2" in text
    # Handlers of the run's log live on in this process.
    log = tmp_path / "log.txt"
    assert {p: b for p, b in content(tmp_path).items() if p != log} == {
        p: b for p, b in before.items() if p != log
    }
    text, _ = dry(capsys, configs["dfd"], "--resume", *shared, "train.max_iter=2")
    assert "Nothing to do" in text


def test_adapter_without_gradient(capsys, configs, data, teacher, tmp_path):
    line, _ = refused(
        capsys, configs["spare"], *data, teacher, f"train.output_dir={tmp_path / 'out'}"
    )
    assert "no gradient reaches 5 trainable parameters of the distillation head" in line
    assert "head.adapters.p2.spare" in line


@pytest.mark.parametrize("criterion", ["mimic", "cwd", "pkd", "mgd", "fgd", "g2sd"])
def test_every_criterion_gives_its_parameters_a_gradient(
    capsys, configs, data, teacher, tmp_path, criterion
):
    dry(
        capsys,
        configs["dfd"],
        *data,
        teacher,
        f"model.head.criterion=${{criteria.{criterion}}}",
        f"train.output_dir={tmp_path / 'out'}",
    )


def test_what_was_dropped_from_the_data_is_told(capsys, configs, teacher, data, tmp_path):
    overrides = [f"dataloader.train.{o}" for o in write_coco(tmp_path, "bad", 4)]
    path = tmp_path / "bad.json"
    truth = json.loads(path.read_text())
    truth["annotations"][0]["bbox"] = [5, 5, 0, 9]
    path.write_text(json.dumps(truth))
    test_data = [o for o in data if o.startswith("dataloader.test")]
    text, _ = dry(
        capsys,
        configs["dfd"],
        *overrides,
        *test_data,
        teacher,
        f"train.output_dir={tmp_path / 'out'}",
    )
    assert "train: boxes dropped, without area: 1, e.g. " in section(text, "Data")
    assert "test: nothing dropped" in section(text, "Data")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["model.teacher.checkpoint=''"], "model.teacher.checkpoint is empty"),
        (["model.head.levels=[p9]"], "model.head.levels asks for ['p9']"),
        (["train.min_teacher_ap=90"], "below train.min_teacher_ap=90"),
        (["train.checkpointer.period=0"], "train.checkpointer.period is 0"),
        (["dataloader.train.dataset._target_=no.such"], "dataloader.train.dataset cannot be built"),
        (["+dataloader.evaluator.bogus=1"], "dataloader.evaluator cannot be built"),
        (["--eval-only"], "--eval-only and --dry-run exclude each other"),
    ],
)
def test_what_a_start_would_refuse_is_refused(
    capsys, configs, data, teacher, tmp_path, arguments, named
):
    flags = [a for a in arguments if a.startswith("--")]
    rest = [a for a in arguments if not a.startswith("--")]
    out = f"train.output_dir={tmp_path / 'out'}"
    line, table = refused(capsys, configs["dfd"], *flags, *data, teacher, *rest, out)
    assert named in line
    assert "Not checked" not in table
    assert not (tmp_path / "out").exists()


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Folders in which a dry run could leave something: working directory, temporary, home."""
    for name in ("cwd", "tmp", "home"):
        (tmp_path / "outside" / name).mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "outside" / "tmp"))
    monkeypatch.setenv("HOME", str(tmp_path / "outside" / "home"))
    monkeypatch.chdir(tmp_path / "outside" / "cwd")

    class Wandb(types.ModuleType):
        def init(self, **settings):
            raise AssertionError("a dry run has begun a W&B run")

    monkeypatch.setitem(sys.modules, "wandb", Wandb("wandb"))
    return tmp_path / "outside"


def everything_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


SHAPES = [f"dataloader.train.dataset.{s}" for s in ("num_train=8", "num_val=3", "image_size=64")]


@pytest.mark.parametrize("ends", ["well", "with an error"])
def test_nothing_outside_the_process(capsys, outside, ends):
    """Not even generated data, a run of W&B, or what an evaluator keeps."""
    before, config = everything_below(outside), f"{ROOT}/configs/demo/student.py"
    arguments = [
        *SHAPES,
        "dataloader.train.dataset.root=shapes",
        "dataloader.train.dataset.num_images=null",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=0",
        "dataloader.test.num_workers=0",
        "dataloader.evaluator.output_dir=kept",
        "train.device=cpu",
        "train.wandb.project=mine",
        "train.output_dir=out",
        "train.disparity_images.period=1",
    ]
    if ends == "well":
        text, _ = dry(capsys, config, *arguments)
        assert "8" in section(text, "Data")
    else:
        refused(capsys, config, *arguments, "optimizer.params.lr_decay=0.5")
    assert everything_below(outside) == before


def test_data_that_are_there_are_used(outside):
    generated_shapes(root="shapes", split="val", num_train=1, num_val=1, image_size=32, seed=0)
    cfg = OmegaConf.create(
        {"dataloader": {s: {"dataset": {"root": s, "_target_": NAME}} for s in ("train", "test")}}
    )
    cfg.dataloader.train.dataset.root = "shapes"
    with leaving_nothing(cfg) as scratch:
        assert cfg.dataloader.train.dataset.root == "shapes"
        assert cfg.dataloader.test.dataset.root.startswith(scratch)
        assert os.path.isdir(scratch)
    assert not os.path.exists(scratch)


def test_wandb_that_is_missing_is_told_all_the_same(capsys, configs, data, teacher, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    line, _ = refused(capsys, configs["dfd"], *data, teacher, "train.wandb.project=x")
    assert "wandb cannot be imported" in line


def test_nothing_is_fetched(capsys, configs, data, outside, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FVCORE_CACHE", str(outside))
    url = "model.teacher.checkpoint=https://example.com/teacher.pth"
    line, _ = refused(capsys, configs["dfd"], *data, url)
    assert "--dry-run opens no network connection" in line
    with leaving_nothing(OmegaConf.create({"dataloader": {}})), socket.socket() as plain:
        plain.settimeout(1)
        with pytest.raises(OSError, match="opens no network connection"):
            plain.connect(("93.184.216.34", 80))
        with pytest.raises(OSError, match="opens no network connection"):
            socket.create_connection(("example.com", 80), timeout=1)


def test_what_a_killed_run_left_is_not_removed(capsys, configs, data, teacher, tmp_path):
    """It may be that of a run that is writing it just now."""
    shared = [*data, teacher, f"train.output_dir={tmp_path}"]
    run(configs["dfd"], *shared, "train.max_iter=1")
    partial = tmp_path / ".model_0000001.pth.partial"
    partial.touch()
    dry(capsys, configs["dfd"], "--resume", *shared)
    assert partial.exists()


def test_terminated_dry_run_removes_its_folder(outside):
    with pytest.raises(SystemExit), leaving_nothing(OmegaConf.create({"dataloader": {}})):
        assert everything_below(outside / "tmp")
        os.kill(os.getpid(), signal.SIGTERM)
        signal.sigtimedwait([], 1)
    assert not everything_below(outside / "tmp")


def test_features_are_kept_in_no_store():
    cfg = OmegaConf.create({"model": {"teacher": {"store": "features"}}, "dataloader": {}})
    with leaving_nothing(cfg) as scratch:
        assert cfg.model.teacher.store.startswith(scratch)

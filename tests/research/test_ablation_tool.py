"""dfd ablate: refusals of one line, the list, and an ablation of real trainings."""

import csv
import json
import os

import pytest
import torch
from coco_files import write_coco
from detectron2.config import instantiate
from forked import Started
from toys import faster_rcnn_config

from dfd.research.ablate import command

CONFIG = "tests/engine/configs/dfd.py"
LENIENT = "model.head.criterion.lenient_on=[high,low]"


@pytest.fixture
def ablate(monkeypatch):
    """``dfd ablate`` as a function of its arguments."""
    monkeypatch.setattr(command, "stop_on_signals", lambda: None)

    def call(*arguments):
        command.main([*map(str, arguments)])

    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "train.max_iter=[]"], "--grid train.max_iter=[] has no value"),
        (["--grid", "train.max_iter"], "it must be KEY=[value,value,...]"),
        (["--grid", "train.max_iter=3"], "it must be KEY=[value,value,...]"),
        (["--grid", "train.max_iter=[1,2"], "it must be KEY=[value,value,...]"),
        (["--grid", "train.max_iter=[range(3),1]"], "is no value"),
        (["--grid", "train.max_iter=[1,1]"], "the cell max_iter=1 is there twice"),
        (["--grid", LENIENT, "--grid", LENIENT], "lenient_on is given twice"),
        (["--grid", LENIENT, LENIENT.replace("[high,low]", "low")], "is given twice"),
        (["--grid", LENIENT, "--cell", f"a={LENIENT.replace('[high,low]', 'low')}"], "given twice"),
        (["--cell", "a=train.max_iter=1", "train.max_iter=2"], "train.max_iter is given twice"),
        (["--cell", "a=train.max_iter=1 train.max_iter=2"], "given twice, by --cell a: only"),
        (["train.max_iter=1", "train.max_iter=1"], "by the overrides of every cell: only one"),
        (["--grid", "train.seed=[1,2]"], "--grid train.seed sets train.seed: --seeds sets"),
        (["--cell", "a=+train.seed=1"], "--cell a sets train.seed"),
        (["train.output_dir=x"], "sets train.output_dir"),
        (["--grid", "train=[{seed: 1}]"], "sets train:"),
        (["--cell", "a"], "--cell a: it must be NAME='key=value"),
        (["--cell", "=a=1"], "it must be NAME="),
        (["--cell", "a=", "--cell", "a=train.max_iter=1"], "the name a was given before"),
        (["--cell", "a=x='1"], "cannot be read: No closing quotation"),
        (["--cell", "a=train.max_iter"], "cannot be read, it must be key=value"),
        (["--cell", "a=", "--cell", "b="], "the cells a and b have the same settings"),
        (["--cell", "x y=", "--cell", "x-y=train.max_iter=1"], "would share the folder x-y"),
        (["--cell", "a=", "--cell", "A=train.max_iter=1"], "would share the folder A"),
        (["--cell", "submitit="], "would take the place of submitit"),
        (["--cell", "a=", "--cell", "b=train.max_itr=1"], "cell b: override train.max_itr"),
        (["--grid", "model.head.wieght=[1,2]"], "cell wieght=1: override model.head.wieght"),
        (["--grid", LENIENT, "--baseline", "high"], "no cell; there are: lenient_on=high; lenient"),
        (["--seeds", "a"], "--seeds a: it must be as 0:5"),
        (["--seeds", "-1"], "--seeds -1: it must be"),
        (["--seeds", "3:3"], "--seeds 3:3 names no seed"),
        (["--seeds", "1,0:2"], "names seed 1 twice"),
        (["--parallel", "0"], "--parallel 0: it must be 1 or more"),
        (["--processes", "0"], "--processes 0: it must be 1 or more"),
        (["--bootstrap", "-1"], "--bootstrap -1: it must be 0 or more"),
        (["--metric", "mAP"], "--metric mAP: it must be AP, AP50"),
        (["--slurm", "partition=x"], "--slurm is given without --cluster slurm"),
        (["--cluster", "slurm"], "needs --slurm 'timeout_min=...'"),
        (["--cluster", "slurm", "--slurm", "x"], "--slurm x: x must be key=value"),
        (["--cluster", "slurm", "--slurm", "timeout_min=9"], "--cluster slurm: submitit: "),
    ],
)
def test_bad_arguments_are_told_in_one_line_before_anything_is_written(
    ablate, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setenv("PATH", str(tmp_path))  # No Slurm, wherever this is run.
    monkeypatch.setattr(
        "dfd.research.ablate.Ablation._launcher", lambda *_: pytest.fail("it was started")
    )
    if arguments[-1] == "-1":  # argparse takes a value that begins with - for an option.
        arguments = ["=".join(arguments)]
    with pytest.raises(SystemExit) as stop:
        ablate("--config-file", CONFIG, "--out", tmp_path / "out", *arguments)
    assert str(stop.value).startswith("error: ") and message in str(stop.value)
    assert "\n" not in str(stop.value)
    assert not any(tmp_path.iterdir())


def test_a_misspelt_class_is_told_before_anything_is_run(ablate, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(command, "run", started.append)
    data = [
        f"dataloader.{split}.{o}"
        for split in ("train", "test")
        for o in write_coco(tmp_path, split, 1)
    ]
    given = ["--config-file", CONFIG, "--out", tmp_path / "out", *data]
    ablate(*given, "--metric", "AP-disc")
    with pytest.raises(SystemExit, match="AP-dics: the test data.s classes are disc, box, bar"):
        ablate(*given, "--metric", "AP-dics")
    # Detectron2 gives no AP of the class where there is but one.
    one = [f"dataloader.{split}.dataset.classes=[disc]" for split in ("train", "test")]
    with pytest.raises(SystemExit, match="AP-disc: the test data have one class, whose AP is AP"):
        ablate(*given, *one, "--metric", "AP-disc")
    # Of data that are elsewhere nothing is known here.
    ablate(*given[:4], "--metric", "AP-dics")
    assert len(started) == 2
    # The list makes no data.
    out = tmp_path / "shapes"
    root = [f"dataloader.{split}.dataset.root={out}" for split in ("train", "test")]
    made = ["--config-file", "configs/demo/dfd.py", "--out", tmp_path / "out", *root]
    ablate(*made, "--list", "--metric", "AP-disc")
    assert not out.exists()


def test_cells_that_will_be_equal_are_told_before_anything_is_run(
    ablate, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "run", lambda ablation: None)
    cells = ["--cell", "a=model.head.weight=2", "--cell", "b=model.head.weight=3"]
    for more in (["--list"], []):
        ablate("--config-file", CONFIG, "--out", tmp_path / "out", *cells, *more)
        told = capsys.readouterr().out
        assert "Note: a and b differ in the weight of distillation alone" in told


def test_a_missing_submitit_is_told_with_the_remedy(ablate, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    with pytest.raises(SystemExit, match=r"needs submitit: pip install -e '.\[cluster\]'"):
        ablate("--config-file", CONFIG, "--out", tmp_path / "out", "--cluster", "local")
    assert not any(tmp_path.iterdir())


def test_the_list_shows_cells_changes_and_places_and_starts_nothing(
    ablate, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    study = tmp_path / "study.txt"
    study.write_text(
        f"# a comment\n\n--config-file {CONFIG}\n--grid={LENIENT}\n"
        "--cell small=model.head.weight=0.5 model.head.levels=[p3,p4]\n"
        "  # another\n--seeds 0,4\n--baseline small, lenient_on=low\ntrain.max_iter=3\n"
    )
    ablate(f"@{study}", "--out", tmp_path / "out", "--list")
    assert capsys.readouterr().out.splitlines() == [
        "4 runs: 2 cells, seeds 0, 4; 0 done",
        "",
        "every cell",
        "    train.max_iter: 4 -> 3",
        "    model.head.weight: not set -> 0.5",
        "    model.head.levels: not set -> [p3,p4]",
        "",
        "small, lenient_on=high (0 of 2 done)",
        "    model.head.criterion.lenient_on: not set -> high",
        "",
        "small, lenient_on=low (baseline, 0 of 2 done)",
        "    model.head.criterion.lenient_on: not set -> low",
        "",
        "1 at a time, each in the first place that is free:",
        "    place 1: the CPU, unless train.device is another; threads: 3",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_of_arguments_may_be_in_any_unicode(ablate, tmp_path, capsys, encoding):
    study = tmp_path / "study.txt"
    study.write_text(f"--config-file {CONFIG}\n--cell größer=train.max_iter=5\n", encoding)
    ablate(f"@{study}", "--out", tmp_path / "out", "--list")
    assert "größer (baseline, 0 of 3 done)" in capsys.readouterr().out


def test_a_file_of_arguments_that_cannot_be_read_is_told_in_one_line(ablate, tmp_path):
    (tmp_path / "latin.txt").write_bytes("--cell größer=".encode("latin1"))
    for name, message in (("latin.txt", "is not text in utf-8"), ("no.txt", "cannot be opened")):
        with pytest.raises(SystemExit, match=f"^error: .*{name} {message}.*") as stop:
            ablate(f"@{tmp_path / name}", "--out", tmp_path / "out")
        assert "\n" not in str(stop.value)


@pytest.mark.slow
def test_averages_are_compared_where_every_run_keeps_one(tmp_path, capsys):
    arguments = ["--config-file", "tests/engine/configs/student.py", "--out", str(tmp_path / "out")]
    arguments += ["--seeds", "0", "--list", "--metric", "ema/AP"]
    with pytest.raises(SystemExit, match="--metric ema/AP: .*seed 0 keeps no average: set train"):
        command.main(arguments)
    command.main([*arguments, "train.ema.decay=0.9"])
    assert capsys.readouterr().out.startswith("1 run")


@pytest.fixture
def forked_runs(monkeypatch):
    """Each training in a process that need not import anything first."""
    monkeypatch.setattr("dfd.research.ablate.local.start", Started)


def test_a_run_of_two_processes_is_one_run(ablate, forked_runs, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", "tests", prepend=os.pathsep)
    splits = {"train": write_coco(tmp_path, "train", 4), "test": write_coco(tmp_path, "val", 2)}
    data = [f"dataloader.{split}.{o}" for split, given in splits.items() for o in given]
    more = ["--seeds", "0", "--processes", "2", "train.max_iter=1", "train.device=cpu"]
    arguments = ["--config-file", "tests/engine/configs/student.py", "--out", tmp_path / "out"]
    ablate(*arguments, "--cell", "plain=", *more, *data, "dataloader.train.total_batch_size=2")
    (summary,) = (tmp_path / "out").glob("plain/seed_0/summary.json")
    assert json.loads(summary.read_text())["processes"] == 2
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert '"processes": 2' in json.dumps(manifest)


@pytest.mark.slow
def test_trainings_that_fail_are_told_and_continued(
    ablate, forked_runs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", "tests", prepend=os.pathsep)
    out, teacher = tmp_path / "out", tmp_path / "teacher.pth"
    splits = {"train": write_coco(tmp_path, "train", 4), "test": write_coco(tmp_path, "val", 2)}
    arguments = [
        *("--config-file", CONFIG, "--out", out, "--parallel", 2),
        *("--cell", "plain=model.head.weight=0 model.teacher.allow_random=true"),
        *("--cell", f"dfd=model.teacher.checkpoint={teacher}"),
        "train.max_iter=2",
        *(f"dataloader.{split}.{o}" for split, opts in splits.items() for o in opts),
    ]
    with pytest.raises(SystemExit) as stop:
        ablate(*arguments, "--seeds", "1")
    assert stop.value.code == 1
    said = capsys.readouterr()
    error = f"model.teacher.checkpoint: no such file: {teacher}"
    assert said.err == f"failed: dfd, seed 1: {error} ({out / 'dfd' / 'seed_1.log'})\n"
    assert "| plain | 1 |" in said.out and "| dfd | 0 | – |" in said.out
    plain = out / "plain" / "seed_1" / "summary.json"
    before = plain.stat().st_mtime_ns

    torch.manual_seed(0)
    torch.save({"model": instantiate(faster_rcnn_config(channels=12)).state_dict()}, teacher)
    ablate(*arguments, "--seeds", "1")
    said = capsys.readouterr()
    assert said.err == "" and "2 runs, 1 of them done before" in said.out
    assert "| plain | 1 |" in said.out and "| dfd | 1 |" in said.out and " of 1 |" in said.out
    assert "| over images |" in said.out and "No interval" not in said.out
    assert plain.stat().st_mtime_ns == before
    with open(out / "results.csv") as f:
        rows = list(csv.DictReader(f))
    assert [row["seed"] for row in rows] == ["1", "1"]
    assert {row["status"] for row in rows} == {"done"}
    for row in rows:
        folder = out / row["cell"] / f"seed_{row['seed']}"
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["seed"] == int(row["seed"]) and summary["iterations"] == 2
        assert float(row["AP"]) == pytest.approx(summary["results"]["bbox"]["AP"], rel=1e-5)
        assert (summary["teacher"] is not None) == (row["cell"] == "dfd")

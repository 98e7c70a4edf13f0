"""dfd demo: from data to report, its progress, and how it ends."""

import sys

import pytest
from forked import Started
from hydra.core.override_parser.overrides_parser import OverridesParser

from dfd.demo import command as demo
from dfd.engine.config.grammar import override
from dfd.engine.console import Interrupted, start
from dfd.errors import UserError


@pytest.mark.slow
def test_demo_runs_from_data_to_report(tmp_path, capsys, monkeypatch):
    out, shapes = tmp_path / "demo", tmp_path / "shapes"
    (out / "teacher").mkdir(parents=True)
    (out / "teacher" / "earlier").touch()
    overrides = [
        "train.max_iter=1",
        "train.device=cpu",
        "train.disparity_images.num_images=1",
        "dataloader.train.dataset.image_size=64",
        "dataloader.train.dataset.num_train=8",
        "dataloader.train.dataset.num_val=2",
        "dataloader.train.dataset.num_images=4",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=0",
        "dataloader.test.num_workers=0",
    ]
    monkeypatch.setattr(demo, "start", Started)
    monkeypatch.setattr(demo, "stop_on_signals", lambda: None)
    demo.main(["--out", str(out), "--data", str(shapes), *overrides])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:5] for line in lines if line.startswith("[")] == [f"[{i}/6]" for i in range(1, 7)]
    assert lines[-1] == f"report: {out / 'report.html'}"
    assert (out / "report.html").stat().st_size > 10_000
    assert (tmp_path / "demo-1" / "teacher" / "earlier").exists()
    assert sum(line.lstrip().startswith("$ ") for line in lines) == 5


def test_demo_shows_what_a_failed_training_said_last(tmp_path, capsys):
    code = "import sys; [print('line', i) for i in range(30)]; sys.exit('error: no such thing')"
    output = tmp_path / "out" / "dfd.txt"
    with pytest.raises(UserError, match="exit code 1") as error:
        demo.follow([sys.executable, "-c", code], output, lambda: "starting")
    assert str(output) in str(error.value)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "error: no such thing"
    assert lines[-20] == "line 11"
    assert output.read_text().startswith("line 0\n")


def test_demo_has_news_although_nothing_is_new(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "NEWS_SECONDS", 0.3)
    code = "import time; time.sleep(1.5); print('the end')"
    text = demo.follow([sys.executable, "-c", code], tmp_path / "dfd.txt", lambda: "evaluating")
    assert text == "the end\n"
    news = [line for line in capsys.readouterr().out.splitlines() if line.endswith(": evaluating")]
    assert len(news) >= 2


def test_demo_ends_its_children_when_it_is_stopped(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(demo, "start", lambda *a, **k: started.append(start(*a, **k)) or started[0])
    monkeypatch.setattr(demo, "NEWS_SECONDS", 0.0)

    def stop():
        raise Interrupted("SIGINT")

    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(Interrupted):
        demo.follow(command, tmp_path / "dfd.txt", stop)
    assert started[0].poll() is not None


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (UserError("no such thing"), "error: no such thing", ""),
        (Interrupted("SIGINT"), 130, "\nstopped by SIGINT; what was running has been ended\n"),
    ],
)
def test_demo_ends_in_one_line(raised, code, said, capsys, monkeypatch):
    def run(*arguments):
        raise raised

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(demo, "stop_on_signals", lambda: None)
    with pytest.raises(SystemExit) as error:
        demo.main([])
    assert (error.value.code, capsys.readouterr().err) == (code, said)


def test_demo_reads_a_trainings_state_from_its_files(tmp_path):
    assert demo.training_state(tmp_path) == "starting"
    (tmp_path / "config.yaml").write_text("train: {amp: {}, max_iter: 300, seed: 0}")
    assert demo.training_state(tmp_path) == "starting"
    metrics = tmp_path / "metrics.json"
    metrics.write_text('{"iteration": 19, "total_loss": 1.25, "eta_seconds": 87.2}\n{"itera')
    expected = "iteration 20 of 300, total loss 1.25, time left 1 min 27 s"
    assert demo.training_state(tmp_path) == expected
    metrics.write_text('{"iteration": 299, "total_loss": 1.25, "eta_seconds": 0.0}\n')
    assert demo.training_state(tmp_path) == "evaluating"


def test_demo_quotes_paths_as_hydra_reads_them():
    for path in ("output/demo", "a b/c=d, (e)", "it's/here"):
        parsed = OverridesParser.create().parse_override(override("key", path))
        assert parsed.value() == path


def test_demo_renames_only_what_is_an_earlier_demonstration(tmp_path):
    (tmp_path / "work").touch()
    with pytest.raises(UserError, match="no earlier demonstration"):
        demo.keep_earlier(tmp_path)


@pytest.mark.parametrize("left", ["teacher/log.txt", "teacher.txt", "dfd/model_final.pth"])
def test_demo_renames_whatever_an_earlier_demonstration_left(tmp_path, left):
    path = tmp_path / "demo" / left
    path.parent.mkdir(parents=True)
    path.touch()
    (tmp_path / "demo-1").mkdir()
    demo.keep_earlier(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()
    assert (tmp_path / "demo-2" / left).exists()

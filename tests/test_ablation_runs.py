"""Runs of an ablation: made, skipped, refused and ended, with a stand-in for training."""

import csv
import fcntl
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from dfd.ablation import Ablation, cluster, make_cells, plan_runs
from dfd.ablation.launch import environments, make_jobs
from dfd.ablation.runs import locked
from dfd.console import Interrupted, end, start
from dfd.errors import UserError

CONFIG = "tests/engine/configs/student.py"
# Its AP is train.max_iter plus ten times the seed. 13 fails, 17 is killed, 19 does not end, 23
# leaves nothing.
STAND_IN = """
import json, os, pathlib, signal, subprocess, sys, time
given = dict(text.split("=", 1) for text in sys.argv[3:])
folder, number = pathlib.Path(given["train.output_dir"]), int(given["train.max_iter"])
folder.mkdir(parents=True)
(folder / "metrics.json").write_text(json.dumps({"iteration": 0, "loss_cls": 1.0}))
print("threads", os.environ["OMP_NUM_THREADS"], flush=True)
if number == 13:
    sys.exit("a line\\nerror: the number is 13\\nlast")
if number == 17:
    os.kill(os.getpid(), signal.SIGKILL)
if number == 19:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "pids").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)
if number != 23:
    scores = {"AP": number + 10 * int(given["train.seed"]), "AP50": 0.0, "AP75": 0.0}
    (folder / "summary.json").write_text(json.dumps({"results": {"bbox": scores}}))
"""


@pytest.fixture
def ablation(tmp_path, monkeypatch):
    """An ablation of train.max_iter that trains with the stand-in."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)

    def make(values=(1, 2), seeds=(0, 1), overrides=(), parallel=4, **kwargs):
        out = tmp_path / "out"
        cells = make_cells(grids=[f"train.max_iter={list(values)}"], overrides=overrides)
        return Ablation(
            config_file=CONFIG,
            out=out,
            cells=cells,
            baseline=cells[0],
            runs=plan_runs(config_file=CONFIG, cells=cells, seeds=seeds, out=out),
            metric="AP",
            script=script,
            parallel=parallel,
            **kwargs,
        )

    return make


def statuses(ablation):
    with open(ablation.out / "results.csv") as f:
        return [row["status"] for row in csv.DictReader(f)]


def modified(ablation):
    return {run.name: (run.folder / "summary.json").stat().st_mtime_ns for run in ablation.runs}


def test_every_cell_is_run_with_every_seed(ablation, capsys):
    given = ablation()
    given.execute()
    assert statuses(given) == ["done"] * 4
    table = (given.out / "results.md").read_text().splitlines()
    assert table[2].startswith("| max_iter=1 | 2 | 6.00 ± 7.07 |")
    assert table[3].endswith("| +1.00 ± 0.00 | 2 of 2 |")
    assert (given.out / "results.png").stat().st_size > 1000
    assert (given.out / "results.html").read_text().count("<img ") == 3
    assert "4 of 4 runs" not in capsys.readouterr().out
    assert not list(given.out.glob(".*.partial"))


def test_runs_that_are_done_are_skipped_and_more_seeds_may_follow(ablation):
    first = ablation()
    first.execute()
    before = modified(first)
    more = ablation(values=(1, 2, 3), seeds=(0, 1, 2))
    more.execute()
    assert statuses(more) == ["done"] * 9
    assert modified(first) == before


def test_failed_runs_stop_no_other_and_are_made_anew(ablation, capsys):
    given = ablation(values=(1, 13, 17, 23), seeds=(0,))
    outcomes = given.execute()
    assert [outcome.status for outcome in outcomes] == ["done", "failed", "failed", "failed"]
    assert [outcome.error for outcome in outcomes[1:]] == [
        "the number is 13",
        "ended by signal 9 (Killed); last line: threads 1",
        "ended without summary.json; last line: threads 1",
    ]
    assert statuses(given) == ["done", "failed", "failed", "failed"]
    assert "Failed: max_iter=13, seed 0: the number is 13" in (given.out / "results.md").read_text()
    before = given.runs[0].folder.stat().st_mtime_ns
    # The settings of a run that is not done may change.
    given = ablation(values=(1, 13), seeds=(0,))
    given.script.write_text(STAND_IN.replace("== 13", "== 14"))
    given.execute()
    assert statuses(given) == ["done", "done"]
    assert "seed_0 is removed and the run started anew" in capsys.readouterr().out
    assert given.runs[0].folder.stat().st_mtime_ns == before


def test_a_summary_that_was_not_written_to_its_end_is_no_finished_run(ablation):
    given = ablation(values=(1,), seeds=(0,))
    given.execute()
    (given.runs[0].folder / "summary.json").write_text('{"results": {"bb')
    given.execute()
    assert given.runs[0].summary()["results"]["bbox"]["AP"] == 1


def test_runs_of_other_settings_are_never_mixed(ablation):
    given = ablation()
    given.execute()
    before = modified(given)
    other = ablation(values=(0, 1, 2), overrides=["optimizer.lr=0.5"])
    with pytest.raises(UserError) as error:
        other.execute()
    message = str(error.value)
    assert message.startswith("max_iter=1, seed 0 is done, but was run with other settings")
    assert "(optimizer.lr was 0.0005, now 0.5)" in message and "\n" not in message
    assert modified(given) == before
    assert not other.runs[0].folder.exists()
    # A key that is gone or new is another setting too.
    record = given.runs[0].record
    record.write_text(record.read_text().replace('"lr":', '"rate":'))
    with pytest.raises(UserError, match=r"optimizer.lr was not there, now 0.0005"):
        given.execute()


def test_what_no_cell_uses_may_change(ablation, tmp_path, monkeypatch):
    config = Path(CONFIG).with_name("student.py").read_text().replace("....configs", "configs")
    config = config.replace("from configs", "from ....configs")
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    (tmp_path / "configs").symlink_to(Path("configs").resolve())
    path = folder / "config.py"
    monkeypatch.setattr(f"{__name__}.CONFIG", str(path))
    extra = "\ncriteria = dict(unused=dict(weight={}))\n"
    path.write_text(config + extra.format(1))
    ablation(values=(1,)).execute()
    path.write_text(config + extra.format(2))
    ablation(values=(1,)).execute()
    path.write_text(config + "optimizer.lr = 0.5\n")
    with pytest.raises(UserError, match="optimizer.lr was"):
        ablation(values=(1,)).execute()


def test_a_folder_that_is_no_run_of_ours_is_left_alone(ablation):
    given = ablation()
    given.execute()
    given.runs[3].record.unlink()
    (given.runs[3].folder / "summary.json").unlink()
    with pytest.raises(UserError, match="seed_1.json is not beside it: no run of an ablation"):
        given.execute()
    assert (given.runs[3].folder / "metrics.json").exists()


def test_a_folder_of_something_else_is_refused(ablation):
    given = ablation()
    given.out.mkdir()
    (given.out / "results.csv").write_text("mine")
    with pytest.raises(UserError, match="is not empty, and holds no ablation"):
        given.execute()
    assert [path.name for path in given.out.iterdir()] == ["results.csv"]
    assert (given.out / "results.csv").read_text() == "mine"


def test_two_at_once_on_one_folder_are_refused(ablation):
    given = ablation()
    with locked(given.out), pytest.raises(UserError, match="is in use by another ablate.py"):
        given.execute()
    given.execute()


def test_a_run_that_outlived_its_ablation_is_not_started_twice(ablation):
    given = ablation(values=(1,), seeds=(0,))
    given.execute()
    (given.runs[0].folder / "summary.json").unlink()
    with open(given.runs[0].log, "ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        orphan = start([sys.executable, "-c", "import time; time.sleep(600)"], output=log)
    try:
        more = ablation(values=(0, 1), seeds=(0,))
        with pytest.raises(UserError, match="max_iter=1, seed 0 is still being trained"):
            more.execute()
        assert not more.runs[0].record.exists()  # Nothing else was started either.
        assert (given.runs[0].folder / "metrics.json").exists()
        assert given.runs[0].log.read_text()  # Nothing of it was lost.
    finally:
        end(orphan)
    given.execute()
    assert statuses(given) == ["done"]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def stop_when(path, number):
    """Send this process a signal once a file is there."""

    def wait():
        while not path.exists() or not path.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


@pytest.fixture
def signals():
    """Ours for a test, then what was there."""
    from dfd.console import SIGNALS, stop_on_signals

    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop_on_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_ends_the_children_and_keeps_the_results_so_far(ablation, signals):
    given = ablation(values=(1, 19), seeds=(0,))
    pids = given.runs[1].folder / "pids"
    stop_when(pids, signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM"):
        given.execute()
    assert [alive(pid) for pid in pids.read_text().split()] == [False, False]
    assert statuses(given) == ["done", "not run"]
    text = (given.out / "results.md").read_text()
    assert "Not complete: 1 of 2 runs have not been made." in text


def test_processes_share_the_machine(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [env["OMP_NUM_THREADS"] for env in environments(3)] == ["2"] * 3
    assert environments(16)[0]["OMP_NUM_THREADS"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in environments(2)[0]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert environments(2)[0]["OMP_NUM_THREADS"] == "5"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in environments(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-7")
    assert [env["CUDA_VISIBLE_DEVICES"] for env in environments(3)] == ["3", "GPU-7", "3"]


def test_slurm_is_given_one_array(ablation, tmp_path, monkeypatch):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"sbatch": "echo Submitted batch job 77", "srun": ":", "sacct": ":"}.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    given = ablation(parallel=3)
    jobs = make_jobs(given.runs, script=given.script, config_file=CONFIG)
    runs = cluster.ClusterRuns(
        jobs,
        cluster="slurm",
        parameters=cluster.parse_slurm("partition=gpu timeout_min=600 gpus_per_node=1"),
        parallel=3,
        folder=tmp_path / "submitit",
    )
    assert runs.poll() == [] and runs.running() == []
    script = (tmp_path / "submitit" / "77_submission.sh").read_text()
    for line in ("array=0-3%3", "partition=gpu", "time=600", "gpus-per-node=1"):
        assert f"#SBATCH --{line}\n" in script


def test_a_job_that_comes_late_does_not_repeat_a_run(ablation):
    given = ablation(values=(1,), seeds=(0,))
    (job,) = make_jobs(given.runs, script=given.script, config_file=CONFIG)
    assert cluster.run_job(job, None) is None
    before = modified(given)
    assert cluster.run_job(job, None) is None
    assert modified(given) == before
    record = json.loads(given.runs[0].record.read_text())
    record["settings"]["train"]["max_iter"] = 2
    given.runs[0].record.write_text(json.dumps(record))
    assert "train.max_iter was 2, now 1" in cluster.run_job(job, None)


def test_a_cluster_s_array_gives_the_same_results(ablation):
    given = ablation(values=(1, 13), seeds=(0,), cluster="local")
    outcomes = given.execute()
    assert [outcome.error for outcome in outcomes] == ["", "the number is 13"]
    assert statuses(given) == ["done", "failed"]
    assert any((given.out / "submitit").iterdir())


def test_a_signal_ends_the_jobs_of_the_array(ablation, signals):
    given = ablation(values=(19,), seeds=(0,), cluster="local")
    pids = given.runs[0].folder / "pids"
    stop_when(pids, signal.SIGINT)
    with pytest.raises(Interrupted, match="SIGINT"):
        given.execute()
    assert [alive(pid) for pid in pids.read_text().split()] == [False, False]
    assert statuses(given) == ["not run"]

"""Runs of an ablation: made, skipped, refused and ended, with a stand-in for training."""

import csv
import errno
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dfd.engine import console
from dfd.engine.config.load import ConfigFile
from dfd.engine.console import Interrupted, end, start
from dfd.errors import UserError
from dfd.research.ablate import UNFINISHED, Ablation, command, make_cells, plan_runs
from dfd.research.ablate import cluster as cluster_module
from dfd.research.ablate import local as launch_module
from dfd.research.ablate.folders import check_earlier, locked, open_log
from dfd.research.ablate.local import describe_places, environments, make_jobs

pytestmark = pytest.mark.slow

CONFIG = "tests/engine/configs/student.py"
# Its AP is train.max_iter plus ten times the seed. 13 fails, 17 is killed, 19 does not end, 23
# leaves nothing, 29 was told to stop, and 31 takes a while to stop when it is told to.
STAND_IN = """
import json, os, pathlib, signal, subprocess, sys, time
given = dict(text.split("=", 1) for text in sys.argv[3:] if "=" in text)
folder, number = pathlib.Path(given["train.output_dir"]), int(given["train.max_iter"])
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "starts", "a") as f:
    print("resumed" if "--resume" in sys.argv else "begun", file=f)
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
if number == 29:
    sys.exit(75)
if number == 31:
    def stop(*_):
        time.sleep(0.5)
        (folder / "model_0000001.pth").write_text("saved")
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    (folder / "pids").write_text(str(signal.getsignal(signal.SIGUSR2)))
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

    def make(values=(1, 2), seeds=(0, 1), overrides=(), parallel=4, distilled=(), **kwargs):
        out = tmp_path / "out"
        config = ConfigFile("tests/engine/configs/dfd.py" if distilled else CONFIG)
        grids = [] if distilled else [f"train.max_iter={list(values)}"]
        cells = make_cells(grids=grids, variants=distilled, overrides=overrides)
        return Ablation(
            config=config,
            out=out,
            cells=cells,
            baseline=cells[0],
            runs=plan_runs(config=config, cells=cells, seeds=seeds, out=out),
            metric="AP",
            program=(sys.executable, str(script)),
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
    # Without any spread nothing is settled.
    assert table[3].endswith("| +1.00 ± 0.00 | 2 of 2 | not settled |")
    assert (given.out / "results.png").stat().st_size > 1000
    assert (given.out / "results.html").read_text().count("<img ") == 3
    assert "4 of 4 runs" not in capsys.readouterr().out
    assert not list(given.out.glob(".*.partial"))


def test_what_changes_nothing_is_told_beside_the_results(ablation):
    """Else two equal students would be compared, and a cell without effect pass for measured."""
    cells = ["a=model.head.weight=2", "b=model.head.weight=3"]
    given = ablation(distilled=cells, overrides=["train.max_iter=2"])
    given.execute()
    for page in ("results.md", "results.html"):
        text = (given.out / page).read_text()
        assert "a and b differ in the weight of distillation alone" in text
        assert "the results of b are those of the baseline on every seed" in text


def test_runs_that_are_done_are_skipped_and_more_seeds_may_follow(ablation):
    first = ablation()
    first.execute()
    before = modified(first)
    more = ablation(values=(1, 2, 3), seeds=(0, 1, 2))
    more.execute()
    assert statuses(more) == ["done"] * 9
    assert modified(first) == before


def test_runs_that_a_command_leaves_out_are_named(ablation, capsys):
    first = ablation()
    first.execute()
    capsys.readouterr()
    fewer = ablation(values=(2,), seeds=(1, 2))
    fewer.execute()
    left = "Left out: 3 finished runs in"
    one, two = (cell.slug for cell in first.cells)
    named = f"({one}/seed_0, {one}/seed_1, {two}/seed_0)"
    for text in (capsys.readouterr().out, (fewer.out / "results.md").read_text()):
        assert left in text and named in text
    ablation(seeds=(0, 1, 2)).execute()
    assert left not in capsys.readouterr().out


@pytest.mark.parametrize(("made", "refused"), [(30, True), (1, False), (0, True)])
def test_a_run_that_was_made_longer_by_hand_is_refused(ablation, made, refused):
    given = ablation()
    given.execute()
    summary = given.runs[0].folder / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"iterations": made}))
    if not refused:
        given.execute()
        return
    with pytest.raises(UserError) as error:
        given.execute()
    said = f"max_iter=1, seed 0 has made {made} iterations, not the 1 of its settings: its folder"
    assert str(error.value).startswith(said)


def test_a_run_of_epochs_that_was_made_longer_is_refused(ablation):
    given = ablation(distilled=["half=train.epochs=0.5"])
    images, batch = 8, given.runs[0].settings["dataloader"]["train"]["total_batch_size"]
    for made, refused in ((math.ceil(images / batch / 2), False), (images // batch + 1, True)):
        for run in given.runs:
            run.folder.mkdir(parents=True, exist_ok=True)
            run.record.write_text(json.dumps({"settings": run.settings}))
            summary = {"iterations": made, "train_images": images}
            (run.folder / "summary.json").write_text(json.dumps(summary))
        if not refused:
            check_earlier(given.runs)
            continue
        with pytest.raises(UserError, match=f"has made {made} iterations, not the "):
            check_earlier(given.runs)


@pytest.mark.parametrize(
    "stops",
    [
        ["train.early_stop.metric=bbox/AP", "train.early_stop.patience=1", "train.eval_period=1"],
        ["train.hooks=[{_target_: my_code.Stop}]"],
    ],
    ids=["early stop", "own hook"],
)
def test_a_run_that_may_stop_early_may_be_shorter(ablation, stops):
    given = ablation(values=(4, 5), overrides=stops)
    given.execute()
    summary = given.runs[0].folder / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"iterations": 2}))
    given.execute()


def test_a_folder_that_is_named_like_the_package_hides_nothing(tmp_path, monkeypatch):
    """As a clone's or a run's folder may be, below which an ablation is started."""
    (tmp_path / "dfd").mkdir()
    monkeypatch.setattr("sys.path", [p for p in sys.path if not p.endswith("projects")])
    (env,) = environments(1)
    code = "import dfd; print(dfd.DFDHead.__name__)"
    arguments = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **arguments)
    assert done.stdout.strip() == "DFDHead", done.stderr


def test_failed_runs_stop_no_other_and_are_continued(ablation, capsys):
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
    given = ablation(values=(1, 13), seeds=(0,))
    Path(given.program[1]).write_text(STAND_IN.replace("== 13", "== 14"))
    given.execute()
    assert statuses(given) == ["done", "done"]
    assert f"it goes on from what is in {given.runs[1].folder}" in capsys.readouterr().out
    assert (given.runs[1].folder / "starts").read_text() == "begun\nresumed\n"
    assert given.runs[0].folder.stat().st_mtime_ns == before


def test_a_summary_that_was_not_written_to_its_end_is_no_finished_run(ablation):
    given = ablation(values=(1,), seeds=(0,))
    given.execute()
    (given.runs[0].folder / "summary.json").write_text('{"results": {"bb')
    given.execute()
    assert given.runs[0].summary()["results"]["bbox"]["AP"] == 1


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_begun_run_of_other_settings_is_named_and_kept(ablation):
    ablation(values=(1, 13), seeds=(0,)).execute()
    other = ablation(values=(0, 13), seeds=(0,), overrides=["optimizer.lr=0.5"])
    run = other.runs[1]
    before = contents(run.out)
    with pytest.raises(UserError) as error:
        other.execute()
    message = str(error.value)
    assert message.startswith("max_iter=13, seed 0 is begun, but was run with other settings")
    assert "(optimizer.lr was 0.0005, now 0.5)" in message and str(run.folder) in message
    assert contents(run.out) == before
    # Nothing is lost with a run that has made nothing, such as one whose data were not there.
    (run.folder / "metrics.json").write_text("")
    other.execute()
    assert statuses(other) == ["done", "failed"]


@pytest.mark.parametrize("damage", ["{", "[]", '{"settings": 3}', None])
def test_begun_run_whose_settings_are_damaged_is_named_and_kept(ablation, damage):
    given = ablation(values=(1, 13), seeds=(0,))
    given.execute()
    run = given.runs[1]
    if damage is None:
        run.record.unlink()
        run.record.mkdir()
    else:
        run.record.write_text(damage)
    before = contents(run.out)
    with pytest.raises(UserError, match=r"max_iter=13, seed 0") as error:
        given.execute()
    assert str(run.folder) in str(error.value) and "\n" not in str(error.value)
    assert contents(run.out) == before


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


def test_runs_made_before_an_upgrade_are_the_same(ablation):
    given = ablation()
    given.execute()
    before = modified(given)
    record = given.runs[0].record
    settings = json.loads(record.read_text())["settings"]
    # A setting of the run that was not there yet, and a class by the module that has it inside.
    assert settings["train"].pop("ema") == {"decay": None, "warmup": None}
    name = settings["optimizer"]["_target_"]
    settings["optimizer"]["_target_"] = "torch.optim.AdamW"
    assert name != "torch.optim.AdamW"
    record.write_text(json.dumps({"settings": settings}))
    given.execute()
    assert modified(given) == before
    settings["train"]["ema"] = {"decay": 0.9}
    record.write_text(json.dumps({"settings": settings}))
    with pytest.raises(UserError, match=r"train.ema.decay was 0.9, now None"):
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
    with locked(given.out), pytest.raises(UserError, match="is in use by another dfd ablate"):
        given.execute()
    given.execute()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_no_error(ablation, monkeypatch, number):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    given = ablation(values=(1,), seeds=(0,))
    with locked(given.out):
        open_log(given.runs[0]).close()


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
    from dfd.engine.console import SIGNALS, stop_on_signals

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:  # One that is ignored where the tests were started would stay so.
        signal.signal(number, signal.SIG_DFL)
    stop_on_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    console._hurried.clear()


def test_a_signal_ends_the_children_and_keeps_the_results_so_far(ablation, signals):
    given = ablation(values=(1, 19), seeds=(0,), parallel=1)
    pids = given.runs[1].folder / "pids"
    stop_when(pids, signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM"):
        given.execute()
    assert [alive(pid) for pid in pids.read_text().split()] == [False, False]
    assert statuses(given) == ["done", "not run"]
    text = (given.out / "results.md").read_text()
    assert "Not complete: 1 of 2 runs have not been made." in text


def test_a_signal_waits_until_the_runs_have_saved_what_they_did(ablation, signals):
    given = ablation(values=(31,), seeds=(0,))
    stop_when(given.runs[0].folder / "pids", signal.SIGUSR1)
    with pytest.raises(Interrupted, match="SIGUSR1"):
        given.execute()
    assert (given.runs[0].folder / "model_0000001.pth").read_text() == "saved"
    assert statuses(given) == ["not run"]


def test_a_second_signal_ends_the_wait(signals):
    child = start(["sh", "-c", "trap '' TERM; echo ready; sleep 600"])
    child.stdout.readline()
    with pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    end(child)
    assert child.returncode == -signal.SIGKILL


def test_a_run_that_was_told_to_stop_is_unfinished_not_failed(ablation, capsys):
    given = ablation(values=(1, 29), seeds=(0,))
    with pytest.raises(SystemExit) as stop:
        command.run(given)
    assert stop.value.code == 75
    assert statuses(given) == ["done", "not run"]
    said = capsys.readouterr()
    assert "not finished: max_iter=29, seed 0 was told to stop" in said.err
    assert "failed" not in said.out + said.err
    Path(given.program[1]).write_text(STAND_IN.replace("== 29", "== 30"))
    given.execute()
    assert statuses(given) == ["done", "done"]
    assert (given.runs[1].folder / "starts").read_text() == "begun\nresumed\n"


def test_a_run_that_cannot_be_started_stops_no_other(ablation, monkeypatch):
    started = launch_module.start

    def start(command, **kwargs):
        if "train.max_iter=2" in command:
            raise OSError(11, "Resource temporarily unavailable")
        return started(command, **kwargs)

    monkeypatch.setattr(launch_module, "start", start)
    given = ablation(values=(1, 2, 3, 4), seeds=(0,), parallel=1)
    given.runs[2].folder.parent.parent.mkdir(parents=True)
    given.runs[2].folder.parent.write_text("a file in the place of a folder")
    (given.out / "ablation.lock").touch()
    outcomes = given.execute()
    assert statuses(given) == ["done", "failed", "failed", "done"]
    assert "Resource temporarily unavailable" in outcomes[1].error
    assert outcomes[2].error.startswith("not started: ")


class Executor:
    """In place of submitit's: jobs are run at once, but one is refused, and any array."""

    def submit(self, function, job, env):
        if job.run.cell.name == "max_iter=1":
            raise RuntimeError("sbatch: error: QOS limit")
        result = function(job, env)
        return SimpleNamespace(done=lambda: True, exception=lambda: None, result=lambda: result)

    def map_array(self, function, jobs, envs):
        raise RuntimeError("sbatch: error: QOS limit")


@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_a_job_that_is_refused_stops_no_other(ablation, monkeypatch, cluster):
    monkeypatch.setattr(cluster_module, "_executor", lambda *_: Executor())
    given = ablation(values=(1, 2), seeds=(0,), cluster=cluster)
    outcomes = given.execute()
    # Slurm is given one array, which is refused as a whole.
    assert statuses(given) == ["failed", "done" if cluster == "local" else "failed"]
    assert outcomes[0].error == "not submitted: sbatch: error: QOS limit"


def test_a_preempted_job_saves_its_run_and_is_queued_again(ablation):
    given = ablation(values=(31,), seeds=(0,))
    (job,) = make_jobs(given.runs, program=given.program, config_file=CONFIG)
    pids, queued = given.runs[0].folder / "pids", []

    def preempt(*_):
        queued.append(cluster_module.run_job.checkpoint(job, None))

    before = signal.signal(signal.SIGUSR2, preempt)
    try:
        stop_when(pids, signal.SIGUSR2)
        assert cluster_module.run_job(job, None) == UNFINISHED
    finally:
        signal.signal(signal.SIGUSR2, before)
    # A cluster tells all processes of a job; the run is to hear of it from its job alone.
    assert pids.read_text() == str(signal.SIG_IGN)
    assert (given.runs[0].folder / "model_0000001.pth").exists()
    assert queued[0].function is cluster_module.run_job and queued[0].args == (job, None)


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


def test_runs_of_several_processes_have_a_device_for_each(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    found = environments(3, processes=2)  # The fifth device makes no pair.
    assert [env["CUDA_VISIBLE_DEVICES"] for env in found] == ["0,1", "2,3", "0,1"]
    assert {env["OMP_NUM_THREADS"] for env in found} == {"1"}
    assert describe_places(2, 2) == [
        "place 1: CUDA device 0,1; 2 processes, threads: 2",
        "place 2: CUDA device 2,3; 2 processes, threads: 2",
    ]
    with pytest.raises(UserError, match="--processes 6: .* there are 5: take fewer"):
        environments(1, processes=6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environments(1, processes=6)[0]["OMP_NUM_THREADS"] == "1"


def test_too_few_devices_are_told_before_anything_is_written(ablation, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    given = ablation(processes=2)
    with pytest.raises(UserError, match="--processes 2"):
        given.execute()
    assert not given.out.exists()


def test_slurm_is_given_one_array(ablation, tmp_path, monkeypatch):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"sbatch": "echo Submitted batch job 77", "srun": ":", "sacct": ":"}.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    given = ablation(parallel=3)
    jobs = make_jobs(given.runs, program=given.program, config_file=CONFIG)
    runs = cluster_module.ClusterRuns(
        jobs,
        cluster="slurm",
        parameters=cluster_module.parse_slurm("partition=gpu timeout_min=600 gpus_per_node=1"),
        parallel=3,
        folder=tmp_path / "submitit",
    )
    assert runs.poll() == [] and runs.running() == []
    script = (tmp_path / "submitit" / "77_submission.sh").read_text()
    for line in ("array=0-3%3", "partition=gpu", "time=600", "gpus-per-node=1"):
        assert f"#SBATCH --{line}\n" in script


def test_a_job_that_comes_late_does_not_repeat_a_run(ablation):
    given = ablation(values=(1,), seeds=(0,))
    (job,) = make_jobs(given.runs, program=given.program, config_file=CONFIG)
    assert cluster_module.run_job(job, None) is None
    before = modified(given)
    assert cluster_module.run_job(job, None) is None
    assert modified(given) == before
    record = json.loads(given.runs[0].record.read_text())
    record["settings"]["train"]["max_iter"] = 2
    given.runs[0].record.write_text(json.dumps(record))
    assert "train.max_iter was 2, now 1" in cluster_module.run_job(job, None)


def test_a_cluster_s_array_gives_the_same_results(ablation):
    given = ablation(values=(1, 13, 29), seeds=(0,), cluster="local")
    outcomes = given.execute()
    assert [outcome.error for outcome in outcomes] == ["", "the number is 13", ""]
    assert statuses(given) == ["done", "failed", "not run"]
    assert any((given.out / "submitit").iterdir())


def test_a_signal_ends_the_jobs_of_the_array(ablation, signals):
    given = ablation(values=(19,), seeds=(0,), cluster="local")
    pids = given.runs[0].folder / "pids"
    stop_when(pids, signal.SIGINT)
    with pytest.raises(Interrupted, match="SIGINT"):
        given.execute()
    assert [alive(pid) for pid in pids.read_text().split()] == [False, False]
    assert statuses(given) == ["not run"]

"""What a user gets wrong: one line that names it, exit code 1, nothing overwritten."""

import logging
import re
import shlex
from pathlib import Path
from string import Template
from typing import NamedTuple

import pytest
import torch
from bad_input_files import make_files, make_state
from commands import run

from dfd.engine.checks import check_output_dir


class Case(NamedTuple):
    name: str
    options: dict[str, str]
    typed: str
    seen: str
    slow: bool


def read_cases():
    text = (Path(__file__).parent / "bad_input.txt").read_text()
    slow = False  # All but the first case below each heading.
    for block in text.split("\n\n"):
        slow = slow and not block.startswith("###")
        lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        if lines:
            header, typed, seen = lines
            name, *options = header.split("  @")
            options = dict(option.partition("=")[::2] for option in options)
            yield Case(name, options, typed.removeprefix(">"), seen, slow)
            slow = True


CASES = list(read_cases())


@pytest.fixture(scope="module")
def given(tmp_path_factory, configs):
    """What the names in bad_input.txt stand for."""
    return make_files(tmp_path_factory.mktemp("given"), configs["dfd"])


@pytest.fixture
def fail(given, capsys, monkeypatch, tmp_path):
    """Runs what must fail; gives the exit code and the lines on stderr."""

    def run_and_fail(config, typed):
        flags = ("--resume", "--eval-only")
        arguments = shlex.split(Template(typed).substitute(given, OUT=tmp_path / "out"))
        before = [a for a in arguments[:1] if a in flags]
        overrides = [f"train.output_dir={tmp_path / 'out'}", *arguments[len(before) :]]
        if not arguments:  # The config itself is wrong and may take no override.
            overrides = []
        # Takes longer than the rest.
        monkeypatch.setattr("dfd.engine.run.collect_env_info", lambda: "")
        with pytest.raises(SystemExit) as stop:
            run(config, *before, *overrides)
        return stop.value.code, capsys.readouterr().err.strip().splitlines()

    loggers = [logging.getLogger(name) for name in ("fvcore", "detectron2", "dfd")]
    handlers = [list(logger.handlers) for logger in loggers]
    yield run_and_fail
    # Or every run would also log to what the runs before it have opened.
    for logger, before in zip(loggers, handlers, strict=True):
        logger.handlers = before


def content(folder):
    """All files but the log, which a failed start is added to."""
    files = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("log.txt")]
    return {p: p.read_bytes() for p in files}


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[pytest.mark.slow] * c.slow) for c in CASES]
)
def test_one_line_and_exit_code_1(given, configs, fail, monkeypatch, tmp_path, case):
    out = tmp_path / "out"
    config = Template(case.options.get("config", "dfd")).substitute(given)
    config = str(Path(configs.get(config, config)).resolve())
    if "state" in case.options:
        make_state(case.options["state"], Path(given["F"]), out)
    if "nocuda" in case.options:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = content(tmp_path)
    monkeypatch.chdir(tmp_path)  # Where malicious weights would leave their mark.

    code, lines = fail(config, case.typed)

    assert code == 1
    seen = Template(case.seen).substitute(given, OUT=out)
    assert re.fullmatch(".*".join(map(re.escape, seen.split("<*>"))), lines[-1]), lines[-1]
    assert sum(line.startswith("error: ") for line in lines) == 1
    after = content(tmp_path)
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in after.keys() - before.keys() if path.suffix == ".pth"]
    assert not (tmp_path / "pwned").exists()


def test_there_are_many_cases_and_no_two_are_the_same():
    assert len({case.name for case in CASES}) == len(CASES) >= 45
    assert len({str(case[1:3]) for case in CASES}) == len(CASES)


def test_failed_start_does_not_block_the_corrected_run(given, configs, fail, tmp_path):
    fail(configs["dfd"], "$GOOD train.init_checkpoint=absent.pth")
    out = tmp_path / "out"
    # Left by a run that was stopped before its first iteration.
    (out / "metrics.json").touch()
    check_output_dir(str(out))
    run(configs["dfd"], *shlex.split(given["GOOD"]), f"train.output_dir={out}", "train.max_iter=1")

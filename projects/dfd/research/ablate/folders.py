"""The runs of an ablation on disk: what was started with which settings, and what is done."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ...engine.config.flat import differing, flat_settings
from ...engine.config.load import PARTS, ConfigFile
from ...engine.config.names import plain_values
from ...engine.config.schema import TRAIN_DEFAULTS
from ...engine.run_folder import SUMMARY, other_data, read_summary, tested_on
from ...engine.state.files import lock, whole_file
from ...errors import UserError, first_line
from .cells import Cell

_LOCK = "ablation.lock"
_TAIL = 64 * 1024  # Bytes; more than the longest line.


@dataclass(frozen=True)
class CellRun:
    """One training: a cell with a seed. ``settings`` are its whole config, as plain values."""

    cell: Cell
    seed: int
    out: Path
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.cell.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """The run's own folder, as ``train_net.py`` writes it."""
        return self.out / self.cell.slug / f"seed_{self.seed}"

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def record(self) -> Path:
        """Holds the settings that the run was started with."""
        return self.folder.with_name(f"{self.folder.name}.json")

    def summary(self) -> dict[str, Any] | None:
        """What the finished run says about itself; None: it has not finished."""
        return read_summary(self.folder / SUMMARY) or None

    def has_work(self) -> bool:
        """Whether its folder holds something that a training has made."""
        metrics = self.folder / "metrics.json"
        made = metrics.is_file() and metrics.stat().st_size > 0
        return made or next(self.folder.glob("*.pth"), None) is not None


def plan_runs(
    *, config: ConfigFile, cells: Sequence[Cell], seeds: Sequence[int], out: Path
) -> list[CellRun]:
    """Every cell with every seed, in the order of running: seed by seed.

    Raises:
        UserError: the config or a cell's overrides are wrong, two cells are the same, or are tested
            on different data.
    """
    config.load()
    settings: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        try:
            cfg = config.load(cell.overrides)
            settings[cell.name] = [_plain_settings(cfg, seed) for seed in seeds]
        except UserError as error:
            raise UserError(f"cell {cell.name}: {error}") from error
        for other, theirs in settings.items():
            if other != cell.name and theirs == settings[cell.name]:
                raise UserError(f"the cells {other} and {cell.name} have the same settings")
            tested = (tested_on(s[0]["dataloader"]) for s in (settings[cell.name], theirs))
            different = other_data(*tested)
            if different:
                raise UserError(
                    f"cell {cell.name} would be tested on other data than {other} ({different}): "
                    "their numbers would not compare"
                )
    return [
        CellRun(cell, seed, out, settings[cell.name][i])
        for i, seed in enumerate(seeds)
        for cell in cells
    ]


def _plain_settings(cfg: DictConfig, seed: int) -> dict[str, Any]:
    """What a config says that a run uses, resolved, without its output folder.

    What other parts hold, such as criteria that the cell does not choose, may change without making
    it another run.
    """
    cfg.train.seed = seed
    cfg.train.output_dir = ""
    try:
        container = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"the config cannot be resolved: {first_line(error)}") from error
    return {part: plain_values(container[part]) for part in PARTS}


def check_earlier(runs: Sequence[CellRun]) -> None:
    """Compare what is on disk with what would be run now.

    Raises:
        UserError: a run was made with other settings, is still running, or is none of ours.
    """
    for run in runs:
        if not run.record.exists():
            if os.path.lexists(run.folder):
                raise UserError(
                    f"{run.folder} is there, but {run.record.name} is not beside it: no run of an "
                    "ablation; move it away or choose another --out"
                )
            continue
        if run.summary() is None and run.log.exists():
            open_log(run, truncate=False).close()
        if run.summary() is not None or run.has_work():
            _check_settings(run)
            _check_length(run)


def other_runs(runs: Sequence[CellRun], out: Path) -> list[str]:
    """Finished runs in an ablation's folder that are none of these, as cell's folder and seed."""
    own = {run.folder for run in runs}
    found = sorted(path.parent for path in out.glob(f"*/seed_*/{SUMMARY}"))
    return [f"{folder.parent.name}/{folder.name}" for folder in found if folder not in own]


def _check_settings(run: CellRun) -> None:
    try:
        earlier = dict(json.loads(run.record.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{run.name}: {run.record}, the settings of {run.folder}, cannot be read "
            f"({first_line(error)}): move both away to begin that run anew"
        ) from error
    # What is new since and at its default, or has moved, is no other setting.
    then, now = (
        flat_settings(settings, {"train": TRAIN_DEFAULTS}, of_functions=False)
        for settings in (earlier, run.settings)
    )
    keys = differing(then, now)
    if keys:
        # The shallowest: what others refer to is most often above them.
        key = min(keys, key=lambda key: (key.count("."), key not in now.texts))
        before, after = (side.texts.get(key, "not there") for side in (then, now))
        state = "done" if run.summary() is not None else "begun"
        raise UserError(
            f"{run.name} is {state}, but was run with other settings ({key} was {before}, now "
            f"{after}): choose another --out, or remove {run.folder}"
        )


def _check_length(run: CellRun) -> None:
    """Refuse a finished run that was made longer by other hands: it is not what was recorded."""
    summary = run.summary() or {}
    train, made = run.settings["train"], summary.get("iterations")
    wanted = train["max_iter"]
    if train.get("epochs") is not None:
        batch = (run.settings.get("dataloader") or {}).get("train", {}).get("total_batch_size")
        images = summary.get("train_images")
        known = batch and images
        wanted = max(1, math.ceil(train["epochs"] * images / batch)) if known else None
    if made is None or wanted is None:
        return
    # A user's hook may end a run too.
    stops = (train.get("early_stop") or {}).get("metric") is not None or train.get("hooks")
    if made > wanted or (made < wanted and not stops):
        raise UserError(
            f"{run.name} has made {made} iterations, not the {wanted} of its settings: its folder "
            f"was trained outside this ablation; remove {run.folder}, or choose another --out"
        )


def prepare(run: CellRun) -> bool:
    """Record a run's settings.

    Returns:
        Whether an earlier attempt has left a folder, from which the run is to go on.
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    write_whole(run.record, json.dumps({"settings": run.settings}, indent=1))
    if not run.folder.is_dir():
        return False
    if run.summary() is None:
        # One that cannot be read: the run would take itself for one that has ended.
        (run.folder / SUMMARY).unlink(missing_ok=True)
    return True


def open_log(run: CellRun, *, truncate: bool = True) -> IO[bytes]:
    """The file for what a run prints, locked for as long as any process of the run has it open.

    So a training that outlived the ``dfd ablate`` that started it is not taken for a dead one.

    Raises:
        UserError: another process has it.
    """
    run.log.parent.mkdir(parents=True, exist_ok=True)
    log = open(run.log, "ab")
    if not lock(log, fcntl.flock):
        log.close()
        raise UserError(
            f"{run.name} is still being trained by a process that has {run.log} open: wait for "
            "it or end it"
        )
    if truncate:
        log.truncate(0)
    return log


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a folder for this process; the operating system gives it back when the process ends.

    Raises:
        UserError: another process has it, it holds something else, or cannot be made.
    """
    path = out / _LOCK
    if out.is_dir() and any(out.iterdir()) and not path.exists():
        raise UserError(f"--out {out} is not empty, and holds no ablation: choose another")
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
    with file:
        if not lock(file, fcntl.flock):
            raise UserError(f"--out {out} is in use by another dfd ablate")
        yield


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old one or all of the new one."""
    with whole_file(path, "w" if isinstance(content, str) else "wb") as f:
        f.write(content)


def tail(path: Path) -> list[str]:
    """The last lines of a file that may still be written to; none if it is not there."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, path.stat().st_size - _TAIL))
            return f.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []

"""Finished runs, read from the folders that ``train_net.py`` wrote.

Such a folder holds ``config.yaml``, ``model_final.pth``, ``metrics.json``, ``summary.json`` and, of
a distilled run, ``disparity/``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..data import registered_name
from ..errors import UserError, first_line
from .config.load import PARTS
from .config.saved import REMEDY, ForeignCodeError, read_config
from .state.checkpoint import FINAL
from .writers import METRICS

SUMMARY = "summary.json"
_FILES = (SUMMARY, "config.yaml", FINAL, METRICS)


@dataclass(frozen=True)
class RunFolder:
    """A finished run: ``metrics`` has the lines of its ``metrics.json``."""

    name: str
    folder: str
    cfg: DictConfig
    summary: dict[str, Any]
    metrics: list[dict[str, float]]

    @property
    def scores(self) -> dict[str, float]:
        return self.summary["results"]["bbox"]

    @property
    def distilled(self) -> bool:
        return "student" in self.cfg.model

    @property
    def student(self) -> DictConfig:
        """The config of the evaluated model."""
        return self.cfg.model.student if self.distilled else self.cfg.model

    def test_dataset(self) -> str:
        """The name of the test data, which are registered if they were not."""
        return registered_name(self.cfg.dataloader.test.dataset)


def read_summary(path: str | os.PathLike) -> dict[str, Any]:
    """What a run has said of itself at its end; empty if that cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        return content if isinstance(content, dict) else {}
    return {}


def parse_runs(arguments: Sequence[str]) -> dict[str, str]:
    """``NAME=FOLDER`` arguments as a dict, in their order.

    Raises:
        UserError: an argument of another form, or a name given twice.
    """
    runs: dict[str, str] = {}
    for argument in arguments:
        name, _, folder = argument.partition("=")
        if not name or not folder:
            raise UserError(f"--run {argument}: it must be NAME=FOLDER")
        if name in runs:
            raise UserError(f"--run {argument}: the name {name} was given before: choose another")
        runs[name] = os.path.expanduser(folder)
    return runs


def load_runs(folders: Mapping[str, str], *, trusted: bool = False) -> list[RunFolder]:
    """Read finished runs, by name.

    Args:
        trusted: whether what their configs name may be of any module, see ``read_config``.

    Raises:
        UserError: a folder or file is missing or cannot be read, a run has not finished, or the
            runs were tested on different data.
    """
    if not folders:
        raise UserError("no runs: give at least one with --run NAME=FOLDER")
    runs = [_load_run(name, folder, trusted) for name, folder in folders.items()]
    first = runs[0]
    for run in runs[1:]:
        different = other_data(*(tested_on(r.cfg.dataloader) for r in (run, first)))
        if different:
            raise UserError(
                f"--run {run.name} was tested on other data than {first.name} ({different}): "
                "their numbers do not compare"
            )
    return runs


def tested_on(dataloader: Mapping[str, Any]) -> dict[str, Any]:
    """By what runs are measured: their test images, and the labels of the evaluator, if another."""
    found = {"dataloader.test.dataset": dataloader["test"]["dataset"]}
    labels = (dataloader.get("evaluator") or {}).get("dataset")
    return found if labels is None else found | {"dataloader.evaluator.dataset": labels}


def other_data(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """How what two runs were ``tested_on`` differs; empty if it is the same."""
    for where in (where for where in ours if where in theirs):
        one, other = _test_data(ours[where]), _test_data(theirs[where])
        for key in sorted(one | other):
            if one.get(key) != other.get(key):
                return f"{where}: {key} is {one.get(key)}, not {other.get(key)}"
    return ""


def _load_run(name: str, folder: str, trusted: bool) -> RunFolder:
    where = f"--run {name}"
    if not os.path.isdir(folder):
        raise UserError(f"{where}: no such folder: {folder}")
    for file in _FILES:
        if not os.path.isfile(os.path.join(folder, file)):
            reason = "the run has not finished" if file == SUMMARY else "it must be there"
            raise UserError(f"{where}: {folder} has no {file}: {reason}")
    try:
        with open(os.path.join(folder, SUMMARY), encoding="utf-8") as f:
            summary = json.load(f)
        with open(os.path.join(folder, METRICS), encoding="utf-8") as f:
            metrics = [json.loads(line) for line in f]
        cfg = read_config(os.path.join(folder, "config.yaml"), trusted=trusted)
    except ForeignCodeError as error:
        raise UserError(f"{where}: {folder}/config.yaml is not read: {error}; {REMEDY}") from error
    except Exception as error:
        raise UserError(f"{where}: {folder} cannot be read: {first_line(error)}") from error
    _check_content(where, folder, cfg, summary, metrics)
    return RunFolder(name, folder, cfg, summary, metrics)


def _check_content(where: str, folder: str, cfg: Any, summary: Any, metrics: Any) -> None:
    """Raise a UserError unless the files hold what a run writes into them."""
    missing = [key for key in PARTS if not (isinstance(cfg, DictConfig) and key in cfg)]
    if missing:
        raise UserError(f"{where}: {folder}/config.yaml is no run's: it has no {missing[0]}")
    if not all(isinstance(line, dict) for line in metrics):
        raise UserError(f"{where}: {folder}/metrics.json is no run's: a line is no object")
    results = summary.get("results") if isinstance(summary, dict) else None
    if not isinstance(results, dict) or not isinstance(results.get("bbox"), dict):
        raise UserError(f"{where}: {folder}/summary.json holds no box AP: evaluate the run")


def _test_data(node: Mapping[str, Any] | str) -> dict[str, Any]:
    """What identifies test data; paths are made absolute."""
    if isinstance(node, str):
        return {"name": node}
    values = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    return {
        key: os.path.abspath(value) if isinstance(value, str) and os.path.exists(value) else value
        for key, value in values.items()
    }


def training_length(folder: Path) -> int | None:
    """The iterations of a run, None before it has come so far as to know them."""
    # The run writes this file before its first iteration, with its epochs turned into a length.
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    found = re.search(r"\bmax_iter: (\d+)", text)
    return int(found[1]) if found else None

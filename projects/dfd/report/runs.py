"""Finished runs, read from the folders that ``train_net.py`` wrote.

Such a folder holds ``config.yaml``, ``model_final.pth``, ``metrics.json``, ``summary.json`` and, of
a distilled run, ``disparity/``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import LazyConfig
from omegaconf import DictConfig, OmegaConf

from ..data import registered_name
from ..errors import UserError

_FILES = ("summary.json", "config.yaml", "model_final.pth", "metrics.json")


@dataclass(frozen=True)
class Run:
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
        runs[name] = folder
    return runs


def load_runs(folders: Mapping[str, str]) -> list[Run]:
    """Read finished runs, by name.

    Raises:
        UserError: a folder or file is missing or cannot be read, a run has not finished, or the
            runs were tested on different data.
    """
    if not folders:
        raise UserError("no runs: give at least one with --run NAME=FOLDER")
    runs = [_load_run(name, folder) for name, folder in folders.items()]
    first = runs[0]
    for run in runs[1:]:
        ours, theirs = _test_data(run), _test_data(first)
        for key in sorted(ours | theirs):
            if ours.get(key) != theirs.get(key):
                raise UserError(
                    f"--run {run.name} was tested on other data than {first.name} "
                    f"(dataloader.test.dataset: {key} is {ours.get(key)}, not {theirs.get(key)}): "
                    "their numbers do not compare"
                )
    return runs


def _load_run(name: str, folder: str) -> Run:
    where = f"--run {name}"
    if not os.path.isdir(folder):
        raise UserError(f"{where}: no such folder: {folder}")
    for file in _FILES:
        if not os.path.isfile(os.path.join(folder, file)):
            reason = "the run has not finished" if file == "summary.json" else "it must be there"
            raise UserError(f"{where}: {folder} has no {file}: {reason}")
    try:
        with open(os.path.join(folder, "summary.json"), encoding="utf-8") as f:
            summary = json.load(f)
        with open(os.path.join(folder, "metrics.json"), encoding="utf-8") as f:
            metrics = [json.loads(line) for line in f]
        cfg = LazyConfig.load(os.path.join(folder, "config.yaml"))
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{where}: {folder} cannot be read: {reason}") from error
    if "bbox" not in (summary.get("results") or {}):
        raise UserError(f"{where}: {folder}/summary.json holds no box AP: evaluate the run")
    return Run(name, folder, cfg, summary, metrics)


def _test_data(run: Run) -> dict[str, Any]:
    """What identifies a run's test data; paths are made absolute."""
    node = run.cfg.dataloader.test.dataset
    if isinstance(node, str):
        return {"name": node}
    values = OmegaConf.to_container(node, resolve=True)
    return {
        key: os.path.abspath(value) if isinstance(value, str) and os.path.exists(value) else value
        for key, value in values.items()
    }

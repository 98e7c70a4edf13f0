"""What metrics.json gets, sent to Weights & Biases too."""

from __future__ import annotations

import os
from collections import defaultdict
from types import ModuleType
from typing import Any

import numpy as np
from detectron2.utils.events import EventWriter, get_event_storage

from ..errors import UserError, first_line
from .state.files import whole_file
from .writers import _SMOOTHING_WINDOW

RUN_ID = "wandb_id.txt"


def import_wandb() -> ModuleType:
    """The wandb package, which this project does not require.

    Raises:
        UserError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"train.wandb.project is set, but wandb cannot be imported ({first_line(error)}): "
            "pip install wandb, or set train.wandb.project=null"
        ) from error
    return wandb


class WandbWriter(EventWriter):
    """Sends each scalar to a W&B run, smoothed as in metrics.json, at the same iteration.

    Not through W&B's own sync of TensorBoard files: with wandb 0.31 a run of 20 iterations became
    628 lines, each value 25 to 41 times, without the last iterations, and at other steps.

    The id of the W&B run is kept in ``<output_dir>/wandb_id.txt``: a run that is continued goes on
    in the same one, in which nothing is sent a second time.
    """

    def __init__(self, output_dir: str, config: dict[str, Any], **settings: Any) -> None:
        """
        Args:
            config: shown with the run.
            settings: of ``wandb.init``: project, entity, name, mode.

        Raises:
            UserError: wandb is not installed, or refuses the run.
        """
        wandb = import_wandb()
        path = os.path.join(output_dir, RUN_ID)
        kept = None
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as f:
                kept = f.read().strip() or None
        settings = {key: value for key, value in settings.items() if value is not None}
        try:
            self._run = wandb.init(
                dir=output_dir, config=config, id=kept, resume="allow" if kept else None, **settings
            )
        except Exception as error:
            raise UserError(
                f"train.wandb: wandb cannot start ({first_line(error)}): log in with `wandb "
                "login`, set train.wandb.mode=offline, or set train.wandb.project=null"
            ) from error
        with whole_file(path) as f:
            f.write(self._run.id)
        # W&B's step is that of the next entry.
        self._last_write = self._run.step - 1

    def write(self) -> None:
        lines: dict[int, dict[str, float]] = defaultdict(dict)
        storage = get_event_storage()
        for name, (value, i) in storage.latest_with_smoothing_hint(_SMOOTHING_WINDOW).items():
            if i > self._last_write:
                # A number of numpy's own would be shown as "np.float64(...)".
                lines[i][name] = value.item() if isinstance(value, np.generic) else value
        for iteration in sorted(lines):
            self._run.log(lines[iteration], step=iteration)
            self._last_write = iteration

    def close(self) -> None:
        self._run.finish()

"""Checkpoints: the bare student under stock Detectron2 keys, and all that a resumed run needs."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import re
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import nn

from ...errors import UserError, first_line
from ...weights.files import ForeignContentError, read_file
from ...weights.strict import (
    WeightFile,
    check_pixels,
    class_names_of,
    keys_of_classes,
    named_weights,
    own_layout,
)
from ..writers import metrics_size
from .files import whole_file
from .random_state import random_state
from .run_settings import changed_settings

logger = logging.getLogger("dfd")

FINAL = "model_final.pth"
BEST = "model_best.pth"
# The best student as it was at the last checkpoint, while a later one has its place.
_BEST_BEFORE = ".model_best_before.pth"
# The running mean of positives that RetinaNet and FCOS divide their losses by.
_NORMALIZER = "loss_normalizer"
_RESUMABLE = {"model", "trainer", "iteration", "random_states", "settings", "metrics_size"}
_TRUNK = re.compile(r"backbone\.(bottom_up|net|trunk)\.")
# What a trunk has for detection alone, so that no weights of it hold them: ViTDet's, Swin's.
_FOR_DETECTION = re.compile(r"rel_pos|^backbone\.\w+\.norm\d+\.")
_NUMBERED = re.compile(r"model_\d+\.pth")


class StudentCheckpointer(DetectionCheckpointer):
    """Saves the student so that an unmodified Detectron2 config loads it.

    What only resuming needs (trainer, optimizer, head) and the class names are entries beside
    ``model``. The teacher is in none of them, but for the hash of its file.
    """

    def __init__(
        self,
        student: nn.Module,
        save_dir: str,
        *,
        class_names: list[str],
        teacher_sha256: str | None = None,
        settings: dict[str, str] | None = None,
        input_format: str | None = None,
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            save_dir: folder of the checkpoints.
            teacher_sha256: of the teacher's file; None: there is none.
            settings: of the run, against which those of a resumed run are held.
            input_format: the order of channels that the student is given; None: its own.
            checkpointables: what else is saved and, when resuming, loaded, by its key.
        """
        super().__init__(student, save_dir, **checkpointables)
        self.class_names = class_names
        self.teacher_sha256 = teacher_sha256
        self.settings = settings or {}
        self.input_format = input_format
        self.teacher_results: dict[str, Any] | None = None  # If they were measured.
        # Path and sha256 of train.init_checkpoint, if the run began with one.
        self.start: dict[str, str] | None = None
        # The same of its timm models' files, if it began with theirs.
        self.pretrained: list[dict[str, str]] = []
        self.changes: list[str] = []  # Of the settings, since a resumed run began.

    def save(self, name: str, **kwargs: Any) -> None:
        """Write a checkpoint; to be called in every process, of which the main one writes."""
        states = comm.gather(random_state())
        if not self.save_dir or not self.save_to_disk:
            return
        parts = {key: value.state_dict() for key, value in self.checkpointables.items()}
        content = {
            "model": self.model.state_dict(),
            **parts,
            "class_names": self.class_names,
            "teacher_sha256": self.teacher_sha256,
            "teacher_results": self.teacher_results,
            "start": self.start,
            "pretrained": self.pretrained,
            "random_states": states,
            # Detectron2's dense detectors keep it beside their weights; share_divisors makes
            # it alike in all processes.
            _NORMALIZER: getattr(self.model, _NORMALIZER, None),
            "settings": self.settings,
            "metrics_size": metrics_size(self.save_dir),
            **kwargs,
        }
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        with whole_file(path, "wb") as f:
            torch.save(content, f)
        with whole_file(os.path.join(self.save_dir, "last_checkpoint")) as f:
            f.write(os.path.basename(path))
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(self.save_dir, _BEST_BEFORE))

    def set_best_aside(self) -> None:
        """Keep the best student of the last checkpoint, from which a killed run goes on."""
        best, before = (os.path.join(self.save_dir, name) for name in (BEST, _BEST_BEFORE))
        if os.path.exists(best) and not os.path.exists(before):
            try:
                os.link(best, before)
            except OSError:  # Not every file system has links.
                shutil.copyfile(best, before)

    def recall_best(self) -> None:
        """Put back the best student that a resumed run knows, if it had found a better one since.

        Where rounding differs from one pass to the next, that one may never come again.
        """
        best, before = (os.path.join(self.save_dir, name) for name in (BEST, _BEST_BEFORE))
        state = self.checkpointables.get("best_checkpoint")
        if not self.save_to_disk or not os.path.exists(before):
            return
        known = state.iterations if state is not None else None
        with contextlib.suppress(Exception):  # One that cannot be read is none.
            if known is not None and self._torch_load(before)["iteration"] == known - 1:
                os.replace(before, best)
                return
        os.remove(before)

    def export(self, name: str, student: nn.Module, **kwargs: Any) -> None:
        """Write a student that no run goes on from; to be called in the main process."""
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving %s", path)
        content = {
            "model": student.state_dict(),
            "class_names": self.class_names,
            "teacher_sha256": self.teacher_sha256,
            "settings": self.settings,
            **kwargs,
        }
        with whole_file(path, "wb") as f:
            torch.save(content, f)

    def keep_last(self, count: int | None) -> None:
        """Remove all numbered checkpoints but the last so many; None: none."""
        if count is None or not self.save_to_disk:
            return
        last = self.get_checkpoint_file()
        # What a run wrote that was resumed from before it does not count.
        for path in [path for path in self._numbered() if path <= last][count:]:
            os.remove(path)

    def _numbered(self) -> list[str]:
        """Paths of the numbered checkpoints, the last first."""
        paths = glob.glob(os.path.join(glob.escape(self.save_dir), "model_*.pth"))
        return sorted((p for p in paths if _NUMBERED.fullmatch(os.path.basename(p))), reverse=True)

    def _last_readable(self) -> tuple[str, dict[str, Any]] | None:
        """Path and content of the last checkpoint that can be read; None if there is none at all.

        Raises:
            UserError: there are some, but none can be read.
        """
        # A run that was killed before it could name its first has no last checkpoint.
        paths = [self.get_checkpoint_file()] if self.has_checkpoint() else []
        final = os.path.join(self.save_dir, FINAL)
        # The last resort: of a run that is made longer it is older than the numbered ones.
        paths += self._numbered() + ([final] if os.path.isfile(final) else [])
        problem = ""
        for path in dict.fromkeys(paths):
            try:
                content = self._torch_load(path)
            except ForeignContentError as error:
                # No run has written this, so it is no damage to be passed over.
                raise UserError(f"--resume: {path} is no checkpoint of a run: {error}") from error
            except Exception as error:
                problem = f"{path}: {first_line(error)}"
                logger.warning("--resume: cannot read %s; the one before it is tried", problem)
                continue
            if isinstance(content, dict) and _RESUMABLE <= set(content):
                return path, content
            problem = f"{path}: it does not hold what resuming needs"
            logger.warning("--resume: %s; the one before it is tried", problem)
        if not problem:
            return None
        raise UserError(
            f"--resume: no checkpoint in {self.save_dir} can be read ({problem}): move the "
            "folder away to begin anew"
        )

    def remove_partial(self) -> None:
        """Remove what a killed run has half written."""
        if self.save_to_disk:
            for path in glob.glob(os.path.join(glob.escape(self.save_dir), ".*.partial")):
                os.remove(path)

    def resume(self) -> dict[str, Any] | None:
        """Load the last checkpoint that can be read, every part of it exactly.

        Returns:
            What of it is in no object: ``iteration`` and ``random_states`` among it. None: there
            is no checkpoint.

        Raises:
            UserError: none can be read, or it is of another model, of another teacher, or of other
                settings that cannot change within a run.
        """
        self.remove_partial()
        found = self._last_readable()
        if found is None:
            return None
        path, content = found
        self.changes = changes = changed_settings(content.pop("settings"), self.settings)
        if changes:
            logger.warning(
                "--resume: the run goes on, but may not end as it would have: %s",
                "; ".join(changes),
            )
        kept = content.get("teacher_sha256")
        if kept != self.teacher_sha256:
            raise UserError(
                "--resume: the teacher's file is not the one that this run began with (sha256 "
                f"{str(self.teacher_sha256)[:16]}, was {str(kept)[:16]}): put that one back, or "
                "begin a new run"
            )
        try:
            self.model.load_state_dict(content.pop("model"))
            for key, part in self.checkpointables.items():
                if key not in content and getattr(part, "optional", False):
                    logger.warning("--resume: %s has no train.%s: it begins now", path, key)
                    continue
                part.load_state_dict(content.pop(key))
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(
                f"--resume: {path} does not fit the config, it is of another run: "
                f"{first_line(error)}"
            ) from error
        if content.get(_NORMALIZER) is not None:
            setattr(self.model, _NORMALIZER, content.pop(_NORMALIZER))
        self.teacher_results = content.pop("teacher_results", None)
        self.start = content.pop("start", None)
        self.pretrained = content.pop("pretrained", [])
        logger.info("Resumed from %s", path)
        return content

    def _load_file(self, filename: str) -> Any:
        what = "train.init_checkpoint"
        try:
            content = self._read(filename)
        except Exception as error:
            raise UserError(
                f"{what}: {filename} is not a readable weight file: {first_line(error)}"
            ) from error
        state = content["model"]
        if not isinstance(state, Mapping) or not state:
            raise UserError(f"{what}: {filename} holds no named weights")
        for key, value in state.items():
            if not isinstance(value, torch.Tensor | np.ndarray):
                raise UserError(
                    f"{what}: {filename} holds {key!r}, a {type(value).__name__}, not a tensor"
                )
        self._tell_other_pixels(filename, content)
        return {**content, "model": self._of_our_classes(state, content.get("class_names"))}

    def _tell_other_pixels(self, filename: str, content: Mapping[str, Any]) -> None:
        """A start from weights of other colours may be meant, but is seldom."""
        pixels = {
            key: torch.as_tensor(value)
            for key, value in content["model"].items()
            if key in ("pixel_mean", "pixel_std")
        }
        settings = content.get("settings")
        settings = settings if isinstance(settings, Mapping) else {}
        settings = {str(key): str(text) for key, text in settings.items()}
        file = WeightFile(filename, "", pixels, None, settings)
        order = self.input_format or getattr(self.model, "input_format", None)
        try:
            check_pixels(self.model, file, "train.init_checkpoint", order)
        except UserError as error:
            logger.warning("%s: the student begins with what was learnt on others", error)

    def _of_our_classes(
        self, state: Mapping[str, Any], names: list[str] | None
    ) -> Mapping[str, Any]:
        """Initial weights without the rows of other classes, which would fit by their number."""
        wrong = set() if names in (None, self.class_names) else set(keys_of_classes(state))
        if wrong:
            logger.warning(
                "train.init_checkpoint was trained on the classes %s, the data's are %s: %d "
                "weights with a row for each class begin anew (%s, ...)",
                names,
                self.class_names,
                len(wrong),
                min(wrong),
            )
        return {key: value for key, value in state.items() if key not in wrong}

    def _read(self, filename: str) -> dict[str, Any]:
        """A weight file as Detectron2's own checkpointer takes it, but without running code."""
        if not filename.endswith((".pkl", ".pyth")):
            content = super()._load_file(filename)  # It calls _torch_load.
            weights, names = content["model"], class_names_of(content)
            if isinstance(weights, Mapping):
                names = names or class_names_of(weights)  # All that another project's file has.
                weights = named_weights(weights)
            if isinstance(weights, Mapping) and all(isinstance(key, str) for key in weights):
                weights = own_layout(self.model, weights)
            return {**content, "model": weights, "class_names": names}
        data = read_file(filename)
        if not isinstance(data, Mapping):
            raise ValueError(f"it holds a {type(data).__name__}, not named weights")
        if filename.endswith(".pyth"):
            weights, author, ignored = data["model_state"], "pycls", "num_batches_tracked"
        elif "__author__" in data and "model" in data:
            return data
        else:
            weights, author, ignored = data.get("blobs", data), "Caffe2", "_momentum"
        weights = {key: value for key, value in weights.items() if not key.endswith(ignored)}
        return {"model": weights, "__author__": author, "matching_heuristics": True}

    def _torch_load(self, f: str) -> Any:
        return read_file(f)

    def _load_model(self, checkpoint: Any) -> Any:
        backbone = {
            key
            for key, value in self.model.state_dict().items()
            if key.startswith("backbone.") and value.is_floating_point()
        }
        incompatible = super()._load_model(checkpoint)
        absent = backbone & set(incompatible.missing_keys)
        learnt = {name for name, _ in self.model.named_parameters()}
        learnt |= {k for k in backbone if k.endswith((".weight", ".bias"))}  # Frozen norms'.
        trunk = {key for key in backbone & learnt if _TRUNK.match(key)} or backbone & learnt
        left = sorted(key for key in absent & trunk if not _FOR_DETECTION.search(key))
        if left and not trunk <= absent:
            logger.warning(
                "train.init_checkpoint holds a part of the student's trunk alone: %d of its %d "
                "weights stay as they were drawn (%s, ...)",
                len(left),
                len(trunk),
                left[0],
            )
        # Fewer than half come from another detector, a few small shapes agreeing by chance.
        if len(absent) > len(backbone) / 2:
            raise UserError(
                f"train.init_checkpoint holds {len(backbone) - len(absent)} of the {len(backbone)} "
                f"weights of the student's backbone (not {', '.join(sorted(absent)[:2])}, ...): it "
                "belongs to another model"
            )
        return incompatible

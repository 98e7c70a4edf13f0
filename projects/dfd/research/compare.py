"""AP and cost of runs as tables, and sentences about what distillation gained."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence

from omegaconf import OmegaConf

from ..engine.config.flat import FlatSettings, differing, flat_settings
from ..engine.config.load import PARTS
from ..engine.config.schema import TRAIN_DEFAULTS
from ..engine.run_folder import RunFolder
from .output import number

CAVEAT = (
    "One run each: differences of a point or two of AP are within what the seed changes. "
    "Repeat with several train.seed before concluding anything from a small difference."
)
# What neither the student's weights nor its results depend on; all else counts. ``epochs`` has
# become ``max_iter`` by the time that a config is saved.
_FREE = (
    "train.output_dir.",
    "train.checkpointer.",
    "train.wandb.",
    "train.log_period.",
    "train.epochs.",
    "train.disparity_images.",
    "train.best_checkpoint.",
    "train.eval_teacher_first.",
    "train.min_teacher_ap.",
    "dataloader.train.num_workers.",
    "dataloader.test.num_workers.",
    "dataloader.evaluator.output_dir.",
    "optimizer.params.model.",
    # The distillation's own parameters.
    "optimizer.params.head_lr_multiplier.",
    "optimizer.params.head_weight_decay.",
)
# Evaluation does not touch the training, but may end it.
_FREE_WITHOUT_A_STOP = ("train.eval_period.", "train.val_loss.")


def format_text(runs: Sequence[RunFolder]) -> str:
    """Everything that the terminal shows about runs."""
    parts = [_format_table(rows) for rows in tables(runs)]
    parts += [textwrap.fill(text, 96) for text in (*gains(runs), CAVEAT)]
    return "\n\n".join(parts)


def _format_table(rows: Sequence[Sequence[str]]) -> str:
    """Plain text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(line) for line in lines)


def tables(runs: Sequence[RunFolder]) -> list[list[list[str]]]:
    """The tables that have rows; the first row of each is its header."""
    return [rows for rows in (_summary_table(runs), _class_table(runs)) if len(rows) > 1]


def _summary_table(runs: Sequence[RunFolder]) -> list[list[str]]:
    """AP and cost, a row a run, and one for its average (``train.ema``)."""
    header = "run|AP|AP50|AP75|train images|params (M)|iterations|s/iteration|memory (MiB)"
    rows = [header.split("|")]
    for run in runs:
        costs = [
            number(run.summary.get("train_images"), ".0f"),
            number(run.summary.get("parameters", math.nan) / 1e6, ".2f"),
            number(run.summary.get("iterations"), ".0f"),
            number(run.summary.get("seconds_per_iteration"), ".3f"),
            number(run.summary.get("peak_memory_mib"), ".0f"),
        ]
        average = (run.summary["results"].get("ema") or {}).get("bbox")
        measured = {run.name: run.scores}
        measured |= {f"{run.name}, its average (EMA)": average} if average else {}
        for name, scores in measured.items():
            shown = [number(scores.get(key), ".1f") for key in ("AP", "AP50", "AP75")]
            rows.append([name, *shown, *costs])
    return rows


def _class_table(runs: Sequence[RunFolder]) -> list[list[str]]:
    """AP of each class, a column a run."""
    keys = dict.fromkeys(key for run in runs for key in run.scores if key.startswith("AP-"))
    return [["AP of class", *(run.name for run in runs)]] + [
        [key.removeprefix("AP-"), *(number(run.scores.get(key), ".1f") for run in runs)]
        for key in keys
    ]


def gains(runs: Sequence[RunFolder]) -> list[str]:
    """A sentence for every two runs of which one is the other with one thing more, all else equal.

    That is a teacher beside it, or a start from the teacher's weights, or both of them at once.
    Runs whose test labels differ are named first, and are not compared.
    """
    groups: dict[str, list[str]] = {}
    for run in runs:
        if run.summary.get("test_data"):
            groups.setdefault(run.summary["test_data"], []).append(f'"{run.name}"')
    sentences = []
    if len(groups) > 1:
        apart = " and ".join(", ".join(names) for names in groups.values())
        sentences.append(
            f"The labels of the test data were changed between {apart}: their AP do not compare."
        )
    for after, before in itertools.product(runs, repeat=2):
        added = _added(before, after)
        if added is None or differences(before, after) or _other_labels(before, after):
            continue
        without, with_it = (run.scores.get("AP", math.nan) for run in (before, after))
        sentences.append(
            f'"{after.name}" is "{before.name}" with {added}, {_else(before, after)}: '
            f"AP {number(without, '.1f')} without, {number(with_it, '.1f')} with "
            f"({number(with_it - without, '+.1f')})."
        )
    return sentences


def _other_labels(one: RunFolder, other: RunFolder) -> bool:
    """Whether two runs are known to have been tested on different labels."""
    hashes = {run.summary.get("test_data") for run in (one, other)} - {None}
    return len(hashes) > 1


def _added(before: RunFolder, after: RunFolder) -> str | None:
    """What of its teacher a run has that another lacks; None if nothing, or not that alone."""
    if not after.distilled:
        return None
    parts = _inherited(after)
    if before.distilled:
        same = parts == _inherited(before) and _teacher(after) == _teacher(before)
        if not same or _distils(before) or not _distils(after):
            return None
        return "a teacher beside it in training, from the same start"
    teacher = ["a teacher beside it in training"] if _distils(after) else []
    start = [f"{', '.join(parts)} initialised from the teacher's weights"] if parts else []
    return " and ".join(teacher + start) or None


def _distils(run: RunFolder) -> bool:
    """Whether a run learns from its teacher, by features or by predictions."""
    of_features = OmegaConf.select(run.cfg, "model.head.weight", default=1) != 0
    if OmegaConf.select(run.cfg, "model.predictions", default=None) is None:
        return of_features
    return of_features or OmegaConf.select(run.cfg, "model.predictions.weight", default=1) != 0


def _inherited(run: RunFolder) -> list[str]:
    return list(run.cfg.model.get("inherit") or ())


def _teacher(run: RunFolder) -> str | None:
    return (run.summary.get("teacher") or {}).get("sha256")


def differences(before: RunFolder, after: RunFolder) -> list[str]:
    """The keys in which one run's student was trained or tested otherwise than another's.

    Every setting counts, and the number of training images, but for those in ``_FREE`` and what
    belongs to the distillation alone.
    """
    return differing(_recipe(before), _recipe(after))


def _else(before: RunFolder, after: RunFolder) -> str:
    """In words, that all else is equal; code and machine are no settings."""
    facts = [
        {
            "the code": (run.summary.get("code") or {}).get("sha256"),
            "the number of processes": run.summary.get("processes"),
            **{f"the {key}": run.summary.get(key) for key in ("processor", "device", "threads")},
            **{key: run.summary.get(key) for key in ("torch", "detectron2")},
        }
        for run in (before, after)
    ]
    other = [
        name
        for name, value in facts[0].items()
        if None not in (value, facts[1][name]) and value != facts[1][name]
    ]
    return f"all settings equal, but not {' and '.join(other)}" if other else "all else equal"


def _recipe(run: RunFolder) -> FlatSettings:
    """All settings of a run but ``_FREE``, with the student in the place of the model."""
    parts = {
        key: OmegaConf.to_container(run.cfg[key], resolve=True) for key in PARTS if key != "model"
    }
    parts["model"] = OmegaConf.to_container(run.student, resolve=True)
    parts["images"] = run.summary.get("train_images")
    flat = flat_settings(parts, {"train": TRAIN_DEFAULTS})
    free = _FREE
    if flat.texts.get("train.early_stop.metric") in (None, "None"):
        free += _FREE_WITHOUT_A_STOP
    texts = {key: text for key, text in flat.texts.items() if not f"{key}.".startswith(free)}
    # The second device of a machine is like the first.
    texts["train.device"] = texts.get("train.device", "").partition(":")[0]
    return FlatSettings(texts, flat.defaults)

"""What ``--dry-run`` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detectron2.utils import comm
from omegaconf import DictConfig
from tabulate import tabulate
from torch import nn

from ...data import dataset_report, registered_name
from ...distill.contract import num_classes
from ...distill.detector import DistilledDetector
from ...distill.precision import resolve_precision
from ..build import Run, student_of
from ..config.resolve import pretrained_trunks
from ..console import duration
from ..machine import processor_name
from ..optim import describe_groups
from .measure import Measured

_MAX_NAMES = 8
_DISTILLATION = "loss_dfd_"


def table(cfg: DictConfig, run: Run, measured: Measured, evaluated: int) -> str:
    """All sections of the table.

    Args:
        evaluated: test images that were evaluated, in this process.
    """
    distilled = isinstance(run.model, DistilledDetector)
    sections = [
        ("Data", _data(cfg, run)),
        ("Teacher", _teacher(cfg, run) if distilled else "none: a plain detector is trained"),
        *([("Levels", _levels(run.model))] if distilled else []),
        ("Weights to start from", _weights(cfg, run)),
        ("Parameters", _parameters(run.model)),
        (f"Optimizer: {type(run.optimizer).__name__}", describe_groups(run.optimizer)),
        (f"Losses at iteration {run.start}", _losses(run, measured)),
        ("Gradients", _gradients(measured)),
        ("Cost", _cost(cfg, run, measured)),
        ("Not checked", "\n".join(f"- {x}" for x in unchecked(cfg, run, measured, evaluated))),
    ]
    return "\n\n".join(
        f"{title}\n" + "\n".join(f"  {line}" for line in text.splitlines())
        for title, text in sections
    )


def _names(names: Sequence[str]) -> str:
    """The first few names, and how many more."""
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def _data(cfg: DictConfig, run: Run) -> str:
    reports = {
        split: dataset_report(registered_name(cfg.dataloader[split].dataset))
        for split in ("train", "test")
    }
    rows = [
        [split, r.name, r.images, r.images_in_source, r.annotations, r.images_without_objects]
        for split, r in reports.items()
    ]
    lines = [tabulate(rows, ["", "dataset", "images", "of", "boxes", "without objects"])]
    classes = list(reports["train"].instances)
    lines.append(f"{len(classes)} classes: {_names(classes)}")
    empty = [name for name, count in reports["train"].instances.items() if count == 0]
    if empty:
        lines.append(f"WITHOUT A TRAINING BOX: {_names(empty)}")
    for split, report in reports.items():
        for kind, count in report.dropped.items():
            lines.append(f"{split}: {kind}: {count}, e.g. {report.examples[kind]}")
        if not report.dropped:
            lines.append(f"{split}: nothing dropped or clipped")
    if run.num_images is not None:
        lines.append(f"trained on: {run.num_images} images")
    return "\n".join(lines)


def _teacher(cfg: DictConfig, run: Run) -> str:
    teacher = run.model.teacher
    weights = teacher.weights
    count = num_classes(teacher.model)
    names = "names not known" if teacher.class_names is None else _names(teacher.class_names)
    precision = resolve_precision(teacher.precision, torch.device(cfg.train.device))
    rows = [
        ["network", f"{teacher.kind}, {teacher.input_format} images"],
        ["checkpoint", weights.path if weights else "NONE: RANDOM WEIGHTS"],
        *([["sha256", weights.sha256]] if weights else []),
        *([["classes", f"{count or 'number not known'}: {names}"]] if teacher.detects else []),
        ["precision of its pass", str(precision).removeprefix("torch.")],
    ]
    results = run.checkpointer.teacher_results
    if results:
        boxes = results["bbox"]
        rows += [[key, f"{boxes[key]:.2f}"] for key in ("AP", "AP50", "AP75")]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def _levels(model: DistilledDetector) -> str:
    rows = [
        [
            pair.name,
            pair.stride,
            pair.student_channels,
            pair.teacher_name,
            pair.teacher_stride,
            pair.teacher_channels,
            _adapter(model.head.adapters[pair.name]),
        ]
        for pair in model.head.pairs
    ]
    headers = ["student", "stride", "channels", "teacher", "stride", "channels", "adapter"]
    return tabulate(rows, headers) + f"\ncriterion {type(model.head.criteria[rows[0][0]]).__name__}"


def _adapter(module: nn.Module) -> str:
    return "none needed" if isinstance(module, nn.Identity) else type(module).__name__


def _weights(cfg: DictConfig, run: Run) -> str:
    if run.state is not None:
        return f"the run's last checkpoint: goes on at iteration {run.start}"
    trunks = pretrained_trunks(cfg.model.get("student", cfg.model))
    lines = [cfg.train.init_checkpoint or "random (train.init_checkpoint is empty)"]
    if trunks and not cfg.train.init_checkpoint:
        lines = ["random, but for the backbone's", *(f"  {trunk}" for trunk in trunks)]
    report = getattr(run.model, "inherit_report", None)
    if report is not None:
        lines.append(
            f"then {len(report.inherited)} tensors of the teacher "
            f"({', '.join(run.model.inherit)}); {len(report.skipped)} of these parts do not fit"
        )
        lines += [f"  not {key}: {reason}" for key, reason in list(report.skipped.items())[:3]]
    return "\n".join(lines)


def _parameters(model: nn.Module) -> str:
    parts = {"student": list(student_of(model).parameters())}
    if isinstance(model, DistilledDetector):
        parts["distillation head"] = list(model.head.parameters())
        parts["teacher"] = list(model.teacher.model.parameters())
    rows = [
        [
            name,
            f"{sum(p.numel() for p in parameters):,}",
            f"{sum(p.numel() for p in parameters if p.requires_grad):,}",
        ]
        for name, parameters in parts.items()
    ]
    return tabulate(rows, ["", "parameters", "trainable"], colalign=("left", "right", "right"))


def _losses(run: Run, measured: Measured) -> str:
    losses = {k: v for k, v in measured.scalars.items() if "loss" in k and k != "total_loss"}
    task = {k: v for k, v in losses.items() if not k.startswith(_DISTILLATION)}
    distillation = {k: v for k, v in losses.items() if k not in task}
    total = sum(task.values())
    rows = [[name, f"{value:.4f}", ""] for name, value in task.items()]
    rows.append(["the task's", f"{total:.4f}", ""])
    rows += [[name, f"{value:.4f}", f"{value / total:.4f}"] for name, value in distillation.items()]
    if distillation:
        share = sum(distillation.values()) / total
        rows.append(["distillation's", f"{share * total:.4f}", f"{share:.4f}"])
    text = tabulate(
        rows,
        ["term", "value", "of the task's" if distillation else ""],
        disable_numparse=True,
        colalign=("left", "right", "right"),
    )
    if not isinstance(run.model, DistilledDetector):
        return text
    head = run.model.head
    now = head.factor(run.start)
    if now != head.weight:
        text += f"\nmodel.head.weight is {head.weight:g}, at this iteration {now:g}"
    return text


def _gradients(measured: Measured) -> str:
    without, zero = measured.without_gradient, measured.zero_gradient
    lines = ["every trainable parameter has one"]
    if without:
        lines = [
            f"NONE for {len(without)} trainable parameters: {_names(without)}; they stay as they "
            "are, and several processes would stop at them (train.ddp.find_unused_parameters)"
        ]
    if zero:
        lines.append(f"exactly 0 for {len(zero)}: {_names(zero)}")
    return "\n".join(lines)


def _cost(cfg: DictConfig, run: Run, measured: Measured) -> str:
    device, world = cfg.train.device, comm.get_world_size()
    processes = "1 process" if world == 1 else f"{world} processes"
    left = max(0, cfg.train.max_iter - run.start)
    batch = cfg.dataloader.train.get("total_batch_size", "?")
    how = f"median of {measured.steps - 1} steps after" if measured.steps > 1 else "that of"
    rows = [
        [
            "device",
            f"{device} ({processor_name(device)}), {processes}, threads: {torch.get_num_threads()}",
        ],
        ["images in a step", batch],
        ["step", f"{measured.seconds:.3f} s ({how} the first, {measured.first_seconds:.3f} s)"],
        ["peak memory", f"{measured.peak_memory_mib:.0f} MiB a process"],
        [
            f"all {left} steps",
            f"about {duration(left * measured.seconds)}, without evaluation and checkpoints",
        ],
    ]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def unchecked(cfg: DictConfig, run: Run, measured: Measured, evaluated: int) -> list[str]:
    """What a real run meets and this one did not."""
    device, world = torch.device(cfg.train.device).type, comm.get_world_size()
    found = []
    if device != "cuda":
        found.append(f"CUDA: this ran on {device}")
    if world == 1:
        found.append("more than one process, or machine")
    batch = cfg.dataloader.train.get("total_batch_size", 0)
    tests = dataset_report(registered_name(cfg.dataloader.test.dataset)).images
    train = "" if run.num_images is None else f" of {run.num_images}"
    read = min(batch * measured.steps, run.num_images or math.inf)
    found.append(
        f"the content of the images that were not read (read: at most {read}"
        f"{train} training images, {evaluated * world} of {tests} test images)"
    )
    found.append("memory of batches with larger images or more objects")
    found.append("the loss beyond these steps: whether the learning rate is too high")
    if cfg.train.init_checkpoint and run.state is None:
        found.append("how good the weights of train.init_checkpoint are")
    if isinstance(run.model, DistilledDetector):
        teacher = run.model.teacher
        if not teacher.detects:
            found.append("how good the teacher is: it detects nothing")
        elif not run.checkpointer.teacher_results:
            found.append(
                "how good the teacher is (--eval-teacher; train.eval_teacher_first=True or "
                "train.min_teacher_ap)"
            )
        if teacher.detects and not teacher.check_classes:
            found.append("the teacher's classes, as model.teacher.check_classes=False says")
        elif teacher.detects and teacher.class_names is None:
            found.append(
                "the names and order of the teacher's classes: its checkpoint does not hold them "
                "(model.teacher.class_names)"
            )
        if run.model.head.factor(run.start) == 0:
            found.append("the distillation, which is off at this iteration")
    if cfg.train.hooks:
        found.append("what the hooks of train.hooks do: they were built, but not called")
    found.append("whether train.output_dir can be written to, and the space on its disk")
    return found

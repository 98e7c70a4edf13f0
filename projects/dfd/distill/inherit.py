"""Starting parts of the student from the teacher's weights ("inheriting").

Kang et al., "Instance-Conditional Knowledge Distillation" (NeurIPS 2021), start a student from its
teacher's neck and head; FGD and MGD do so too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import UserError

# Name of a part to the prefixes of its keys in a Detectron2 detector.
PARTS = {
    "fpn_output": ("backbone.fpn_output", "backbone.top_block."),
    "proposal_generator": ("proposal_generator.",),
    "heads": ("roi_heads.", "head."),
}


@dataclass
class InheritReport:
    """What was and what was not inherited, by the student's key; the latter with the reason."""

    inherited: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"Inherited from the teacher: {len(self.inherited)} tensors"]
        lines += [f"  + {key}" for key in self.inherited]
        lines.append(f"Not inherited: {len(self.skipped)} tensors of the chosen parts")
        lines += [f"  - {key}: {reason}" for key, reason in self.skipped.items()]
        return "\n".join(lines)


@torch.no_grad()
def inherit_weights(student: nn.Module, teacher: nn.Module, parts: Sequence[str]) -> InheritReport:
    """Copy the teacher's weights into chosen parts of the student where the shapes agree.

    Args:
        parts: names from ``PARTS``: "fpn_output" (the pyramid's output convolutions and its top
            block), "proposal_generator", "heads"; or any prefix of the student's keys that ends
            with a dot, such as "roi_heads.box_head.".

    Raises:
        UserError: an unknown part, or one of which nothing could be inherited.
    """
    ours, theirs = student.state_dict(), teacher.state_dict()
    report = InheritReport()
    for part in parts:
        if part not in PARTS and not part.endswith("."):
            raise UserError(
                f"model.inherit names {part!r}; it must be one of {', '.join(PARTS)}, or a prefix "
                "of the student's keys that ends with a dot"
            )
        before = len(report.inherited)
        for key, value in ours.items():
            if not key.startswith(PARTS.get(part, part)):
                continue
            if key not in theirs:
                report.skipped[key] = "the teacher has no such key"
            elif theirs[key].shape != value.shape:
                report.skipped[key] = (
                    f"shape {tuple(value.shape)}, the teacher's {tuple(theirs[key].shape)}"
                )
            else:
                value.copy_(theirs[key])
                report.inherited.append(key)
        if len(report.inherited) == before:
            reasons = sorted(set(report.skipped.values())) or ["the student has no such part"]
            raise UserError(
                f"model.inherit: nothing of {part!r} can be inherited: {'; '.join(reasons[:3])}"
            )
    return report

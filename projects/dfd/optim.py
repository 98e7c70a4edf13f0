"""What an optimizer's groups hold."""

from __future__ import annotations

import torch


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """A line a group: tensors, parameters, learning rate, weight decay."""
    lines = []
    for index, group in enumerate(optimizer.param_groups):
        count = sum(p.numel() for p in group["params"])
        lines.append(
            f"{group.get('name', f'group {index}')}: {len(group['params'])} tensors, {count} "
            f"parameters, lr {group['lr']:g}, weight decay {group.get('weight_decay', 0):g}"
        )
    return "\n".join(lines)

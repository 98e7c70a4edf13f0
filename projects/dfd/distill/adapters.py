"""From the student's channels to the teacher's, one module a level."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..errors import UserError
from ..ranges import check_choice

ADAPTERS = ("auto", "conv1x1", "conv3x3", "mlp", "none")


class ChannelMLP(nn.Sequential):
    """LayerNorm over channels, then two linear layers with a GELU between them, at each cell.

    For a ViT under a CNN: it takes out what tokens carry in their length, and is no linear map.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.LayerNorm(in_channels),
            nn.Linear(in_channels, out_channels),
            nn.GELU(),
            nn.Linear(out_channels, out_channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(N,C,H,W) to (N,C',H,W)."""
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def make_adapter(
    kind: str | Callable[[int, int], nn.Module], in_channels: int, out_channels: int
) -> nn.Module:
    """The module that brings the student's channels to the teacher's.

    Args:
        kind: "auto" (nothing if the channels agree, else a 1x1 convolution), "conv1x1",
            "conv3x3", "mlp" (see ``ChannelMLP``), "none" (refused unless the channels agree), or a
            function of (in_channels, out_channels) that returns a module.
    """
    if isinstance(kind, nn.Module):
        raise UserError(
            f"model.head.adapter is a {type(kind).__name__}: each level needs one of its own, so "
            "give a function of (in_channels, out_channels) that returns a module"
        )
    if callable(kind):
        adapter = kind(in_channels, out_channels)
        if not isinstance(adapter, nn.Module):
            raise UserError(
                f"model.head.adapter returns a {type(adapter).__name__} for {in_channels} to "
                f"{out_channels} channels: it must return a module"
            )
        return adapter
    check_choice("model.head.adapter", kind, ADAPTERS)
    if kind == "none" and in_channels != out_channels:
        raise UserError(
            f"model.head.adapter is 'none', but the student has {in_channels} channels and the "
            f"teacher {out_channels}: use 'auto'"
        )
    if kind == "none" or (kind == "auto" and in_channels == out_channels):
        return nn.Identity()
    if kind == "mlp":
        return ChannelMLP(in_channels, out_channels)
    size = 3 if kind == "conv3x3" else 1
    adapter = nn.Conv2d(in_channels, out_channels, size, padding=size // 2)
    nn.init.kaiming_normal_(adapter.weight, mode="fan_in", nonlinearity="linear")
    nn.init.zeros_(adapter.bias)
    return adapter

"""Norms under a name that a saved config can hold."""

from torch import nn


def layer_norm(channels: int) -> nn.LayerNorm:
    """ViT's LayerNorm: eps is 1e-6, not torch's 1e-5."""
    return nn.LayerNorm(channels, eps=1e-6)

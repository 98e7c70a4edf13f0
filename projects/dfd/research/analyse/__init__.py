"""How disparity is spread over cells, levels, object sizes and training time, and over errors."""

from .analyse import analyse

__all__ = ["analyse"]

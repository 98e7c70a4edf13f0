"""What configs take from :mod:`dfd.engine.optim`, under the name that saved configs hold."""

from .engine.optim import parameter_groups

__all__ = ["parameter_groups"]

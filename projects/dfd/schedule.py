"""What configs take from :mod:`dfd.engine.schedule`, under the name that saved configs hold."""

from .engine.schedule import QuadraticWarmupCosine

__all__ = ["QuadraticWarmupCosine"]

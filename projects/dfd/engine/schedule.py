"""Schedules of the learning rate that neither Detectron2 nor fvcore has."""

from __future__ import annotations

from fvcore.common.param_scheduler import CosineParamScheduler, ParamScheduler

from ..errors import UserError


class QuadraticWarmupCosine(ParamScheduler):
    """YOLOX's: from 0 by the square of the time, a cosine down, and a constant closing part.

    A factor of the learning rate, over the run as [0, 1]: ``(where / warmup) ** 2`` in the warm-up,
    then from 1 to ``end_value``, which it keeps in the closing part.
    """

    def __init__(
        self, *, warmup: float = 5 / 300, closing: float = 15 / 300, end_value: float = 0.05
    ) -> None:
        """
        Args:
            warmup: share of the run; 0: none.
            closing: share of the run; 0: none.
            end_value: from 0 to 1.

        Raises:
            UserError: a share is below 0, or nothing is left between the two.
        """
        if not (warmup >= 0 and closing >= 0 and warmup + closing < 1 and 0 <= end_value <= 1):
            raise UserError(
                f"QuadraticWarmupCosine(warmup={warmup}, closing={closing}, end_value={end_value}):"
                " needs shares of at least 0 whose sum is below 1, and an end_value from 0 to 1"
            )
        self.warmup, self.closing, self.end_value = warmup, closing, end_value
        self._cosine = CosineParamScheduler(1.0, end_value)

    def __call__(self, where: float) -> float:
        if where < self.warmup:
            return (where / self.warmup) ** 2
        between = (where - self.warmup) / (1 - self.warmup - self.closing)
        return self._cosine(min(between, 1.0))

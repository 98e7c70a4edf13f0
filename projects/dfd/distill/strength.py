"""How strongly a head's loss counts, over the iterations of a training."""

from __future__ import annotations

from torch import nn

from ..ranges import check_count, check_number


class TimedHead(nn.Module):
    """A head whose loss has a weight, to which it rises, and may end before the training does."""

    def __init__(self, where: str, weight: float, warmup_iters: int, end_iter: int | None) -> None:
        """
        Args:
            where: names it in a config, for messages.
            weight: multiplies the loss; >= 0.
            warmup_iters: the weight rises linearly over so many iterations.
            end_iter: it stops at this iteration; None: never.

        Raises:
            UserError: a value outside its range.
        """
        super().__init__()
        check_number(f"{where}.weight", weight)
        check_count(f"{where}.warmup_iters", warmup_iters, 0)
        if end_iter is not None:
            check_count(f"{where}.end_iter", end_iter, 0)
        self.weight, self.warmup_iters, self.end_iter = weight, warmup_iters, end_iter

    def factor(self, iteration: int) -> float:
        """What the loss is multiplied by at this iteration, warm-up included; 0 if inactive."""
        if self.end_iter is not None and iteration >= self.end_iter:
            return 0.0
        return self.weight * self._warmup(iteration)

    def _warmup(self, iteration: int) -> float:
        return min(1.0, (iteration + 1) / self.warmup_iters) if self.warmup_iters else 1.0

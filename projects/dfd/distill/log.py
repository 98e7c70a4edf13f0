"""What a distilled step has to log: losses against the labels', the head's numbers, gradients."""

from __future__ import annotations

import logging

import torch
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor

from ..errors import UserError
from .gradient_share import GradientShare

logger = logging.getLogger(__name__)

# So many iterations in a row may have a distillation loss of zero before it is an error; below this
# it is rounding, for the teacher's pass rounds otherwise than the student's.
_MAX_ZERO_STEPS, _ZERO = 10, 1e-9


class DistillationLog:
    """Numbers of forward passes, for the storage of the training.

    ``later``: whether they wait for :meth:`write`. Reading a number from the device waits for all
    that it has to do, and would leave it idle before the backward pass.
    """

    def __init__(self, gradient_share: GradientShare | None) -> None:
        """
        Args:
            gradient_share: the head's, whose measurements are logged too.
        """
        self.later = False
        self._gradient_share = gradient_share
        self._pending: list[tuple[list[str], Tensor]] = []
        self._zero_steps = 0
        self._told_limit = False

    def add(
        self,
        task: dict[str, Tensor],
        distillation: dict[str, Tensor],
        stats: dict[str, Tensor],
    ) -> None:
        """The ``stats`` of a forward, and the ratio of its distillation loss to the task loss.

        Raises:
            UserError: see :meth:`write`, unless that is to be later.
        """
        task_loss = sum(loss.detach().float() for loss in task.values())
        stats = dict(stats)
        for key, loss in distillation.items():
            level = key.removeprefix("loss_dfd_")
            stats[f"dfd/{level}/ratio"] = loss.detach() / task_loss
        total = sum(loss.detach() for loss in distillation.values())
        stats["dfd/ratio"] = total / task_loss
        values = torch.stack([value.float() for value in stats.values()] + [total.float()])
        self._pending.append((list(stats), values))
        if not self.later:
            self.write()

    def write(self) -> None:
        """Log what waits, read in one transfer for all of it.

        Raises:
            UserError: the distillation loss has been 0 for too long.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        measured = [] if self._gradient_share is None else self._gradient_share.take_measured()
        numbers = iter(torch.cat([values for _, values in (*measured, *pending)]).tolist())
        for names, _ in measured:
            self._write_gradients({name: next(numbers) for name in names})
        for names, _ in pending:
            # In this order: the total is the last of its forward.
            scalars = {name: next(numbers) for name in names}
            self._zero_steps = self._zero_steps + 1 if abs(next(numbers)) < _ZERO else 0
            if self._zero_steps > _MAX_ZERO_STEPS:
                raise UserError(
                    f"the distillation loss was 0 for {self._zero_steps} iterations: the "
                    "student's pyramid equals the teacher's, or the weights of all levels or "
                    "regions are 0, or the criterion gives 0 (one that is to begin later: take "
                    "model.head.warmup_iters)"
                )
            if has_event_storage():
                get_event_storage().put_scalars(smoothing_hint=True, **scalars)

    def _write_gradients(self, scalars: dict[str, float]) -> None:
        """Without ``later`` they are of the backward pass before this forward."""
        if not has_event_storage():
            return
        get_event_storage().put_scalars(smoothing_hint=True, **scalars)
        factor = min(v for name, v in scalars.items() if name.endswith("/gradient_factor"))
        if factor < 1 and not self._told_limit:
            self._told_limit = True
            self._tell_limit(self._gradient_share.share, factor)

    def _tell_limit(self, share: float, factor: float) -> None:
        """Say that the limit holds: a weight that is tuned then would seem not to matter."""
        logger.info(
            "Distillation's gradient is limited to %g times the labels' "
            "(model.head.gradient_share), here to %.2g of what it would be. While it is, the "
            "weights of head and criterion have no effect on the student: to tune its strength, "
            "set gradient_share",
            share,
            factor,
        )

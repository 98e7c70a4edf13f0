"""The training loop: Detectron2's, with autocast on any device and errors that name the term."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import UserError

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer(SimpleTrainer):
    """SimpleTrainer with mixed precision on CUDA and CPU.

    Detectron2's own AMPTrainer needs CUDA. fp16 gradients are scaled, bf16 ones need not be.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: Optimizer,
        *,
        device: str,
        amp: str | None = None,
    ) -> None:
        """
        Args:
            device: where the model is.
            amp: "bf16", "fp16" (CUDA only), or None for fp32.
        """
        super().__init__(model, data_loader, optimizer)
        if amp is not None and amp not in AMP_DTYPES:
            raise UserError(f"train.amp.dtype is {amp!r}; it must be one of {list(AMP_DTYPES)}")
        self.device_type = torch.device(device).type
        if amp == "fp16" and self.device_type != "cuda":
            raise UserError(f"train.amp.dtype is fp16, which needs CUDA, not {device}: use bf16")
        self.amp_dtype = AMP_DTYPES.get(amp)
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=amp == "fp16")

    def train(self, start_iter: int, max_iter: int) -> None:
        """As Detectron2's, but a user's error is not buried under a traceback."""
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                for self.iter in range(start_iter, max_iter):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                # Tells after_train that the run has ended well.
                self.iter += 1
            except BaseException:
                # Detectron2's EvalHook takes a failure in the last iteration for the end.
                self.max_iter += 1
                raise
            finally:
                self.after_train()

    def run_step(self) -> None:
        if not self.model.training:
            raise RuntimeError("the model was left in eval mode, by a hook or an evaluation")
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        try:
            with torch.autocast(
                self.device_type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
            ):
                losses = self.model(data)
        except FloatingPointError as error:
            # Raised by Detectron2's proposal generator.
            raise UserError(
                f"training diverged at iteration {self.iter}: {error} Lower optimizer.lr or the "
                "weight of the distillation."
            ) from error
        self._check_finite(losses)
        self.optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values())).backward()
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _check_finite(self, losses: dict[str, Tensor]) -> None:
        """Raise before a loss that is no number reaches the weights."""
        values = torch.stack([loss.detach().float() for loss in losses.values()]).tolist()
        for name, value in zip(losses, values, strict=True):
            if value - value == 0:
                continue
            what = "the student's own"
            if name.startswith("loss_dfd_"):
                level = name.removeprefix("loss_dfd_")
                what = f"distillation, level {level}{self._bad_terms(level)}"
            raise UserError(
                f"{name} ({what}) is {value} at iteration {self.iter}: the weights were not "
                "touched; lower optimizer.lr or the weight of this term"
            )

    def _bad_terms(self, level: str) -> str:
        """The terms of a level's loss that are not finite, as the head has logged them."""
        prefix = f"dfd/{level}/term_"
        terms = [
            key.removeprefix(prefix)
            for key, (value, _) in self.storage.latest().items()
            if key.startswith(prefix) and value - value != 0
        ]
        return f", term {', '.join(terms)}" if terms else ""

    def state_dict(self) -> dict:
        state = super().state_dict()
        state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])

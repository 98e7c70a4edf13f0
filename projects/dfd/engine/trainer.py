"""The training loop: Detectron2's, with autocast on any device and errors that name the term."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..distill.detector import DistilledDetector
from ..distill.log import DistillationLog
from ..errors import UserError
from ..ranges import check_choice
from .machine import peak_memory_mib
from .narrow_inputs import widen_narrow_inputs
from .writers import recent_scalars, restore_scalars

logger = logging.getLogger("dfd")

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Below this scale fp16 gradients vanish, so one that still overflows is not the scale's fault.
_MIN_GRAD_SCALE = 2.0**-14


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
        accumulation_steps: int = 1,
        clip_grad_norm: float | None = None,
    ) -> None:
        """
        Args:
            device: where the model is.
            amp: "bf16", "fp16" (CUDA only), or None for fp32.
            accumulation_steps: batches whose gradients are averaged into one step; >= 1.
            clip_grad_norm: a gradient whose norm is larger is scaled down to it; that of a
                distillation head by itself, for its length says nothing of the student's. > 0,
                None for no limit.
        """
        super().__init__(model, data_loader, optimizer)
        if amp is not None:
            check_choice("train.amp.dtype", amp, AMP_DTYPES)
        self.device_type = torch.device(device).type
        if amp == "fp16" and self.device_type != "cuda":
            raise UserError(f"train.amp.dtype is fp16, which needs CUDA, not {device}: use bf16")
        self.amp_dtype = AMP_DTYPES.get(amp)
        if amp is not None and self.device_type == "cpu":
            widen_narrow_inputs(model)
        self.accumulation_steps = accumulation_steps
        self.clip_grad_norm = clip_grad_norm
        self._resumed_scalars: dict[str, Any] = {}
        self._resumed_hooks: dict[str, Any] = {}
        self._clipped = _parts(self._detector)
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=amp == "fp16")

    def register_hooks(self, hooks: Sequence[HookBase | None]) -> None:
        """As Detectron2's; a hook of which a resumed checkpoint holds the state is given it."""
        super().register_hooks(hooks)
        for name, hook in _named_hooks(self._hooks):
            state = self._resumed_hooks.pop(name, None)
            if state is not None:
                hook.load_state_dict(state)

    @property
    def _detector(self) -> nn.Module:
        """The model, without what spreads it over processes."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def train(self, start_iter: int, max_iter: int) -> None:
        """As Detectron2's, but a user's error is not buried under a traceback."""
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        # A scripted function (the focal loss of RetinaNet and FCOS) would be optimised after its
        # first calls and round otherwise then: a resumed run would not end as it would have.
        unoptimised = torch.jit.optimized_execution(False)
        with unoptimised, EventStorage(start_iter) as self.storage:
            restore_scalars(self.storage, self._resumed_scalars)
            for name in self._resumed_hooks:
                logger.warning("--resume: this run has no hook %s: its state is lost", name)
            try:
                self.before_train()
                for self.iter in range(start_iter, max_iter):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    # Less than it was if a hook ends the run.
                    if self.iter + 1 >= self.max_iter:
                        break
                # Tells after_train that the run has ended well. (Not one more than the last: a run
                # resumed after its last iteration has none left.)
                self.iter = self.max_iter
            except BaseException:
                # Detectron2's EvalHook takes a failure in the last iteration for the end.
                self.max_iter += 1
                raise
            finally:
                self.after_train()

    def run_step(self) -> None:
        if not self.model.training:
            raise RuntimeError("the model was left in eval mode, by a hook or an evaluation")
        self.optimizer.zero_grad()
        parts: list[dict[str, Tensor]] = []
        data_time = 0.0
        with self._mean_scalars(), self._log_later():
            for left in reversed(range(self.accumulation_steps)):
                start = time.perf_counter()
                data = next(self._data_loader_iter)
                data_time += time.perf_counter() - start
                # Only the last backward has to wait for the other processes.
                alone = left > 0 and isinstance(self.model, DistributedDataParallel)
                with self.model.no_sync() if alone else contextlib.nullcontext():
                    losses = self._losses(data)
                    loss = sum(losses.values()) / self.accumulation_steps
                    self.grad_scaler.scale(loss).backward()
                parts.append({name: loss.detach().float() for name, loss in losses.items()})
            self.after_backward()
            norm = self._clip_gradients()
            # Nothing waits for the device until all of the step's work is queued.
            values, norm = self._read(parts, norm)
        self._check_finite(values)
        self._check_norm(norm)
        # Tensors, as Detectron2 wants them, but on the CPU, where reading them is free.
        means = {
            name: torch.tensor(sum(numbers) / len(numbers), dtype=torch.float64)
            for name, numbers in values.items()
        }
        self._write_metrics(means, data_time)
        self.grad_scaler.step(self.optimizer)
        self._update_scale()
        self.storage.put_scalar("peak_memory_mib", peak_memory_mib(), smoothing_hint=False)

    @contextlib.contextmanager
    def _mean_scalars(self) -> Iterator[None]:
        """Within the context, what the model logs is collected; then its means are logged.

        Else only the last batch of a step would be told, and medians would span fewer steps.
        """
        if self.accumulation_steps == 1:
            yield
            return
        with EventStorage(self.iter) as inner:
            yield
        hints = inner.smoothing_hints()
        for name, history in inner.histories().items():
            self.storage.put_scalar(name, history.global_avg(), smoothing_hint=hints[name])
        self.storage._vis_data.extend(inner._vis_data)
        self.storage._histograms.extend(inner._histograms)

    def _losses(self, data: list[dict]) -> dict[str, Tensor]:
        """The losses of a batch."""
        try:
            with torch.autocast(
                self.device_type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
            ):
                return self.model(data)
        except FloatingPointError as error:
            # Raised by Detectron2's proposal generator.
            raise UserError(
                f"training diverged at iteration {self.iter}: {error} Lower optimizer.lr or the "
                "weight of the distillation."
            ) from error

    @contextlib.contextmanager
    def _log_later(self) -> Iterator[None]:
        """Within the context, what a distillation has to log waits for its end."""
        log = getattr(self._detector, "log", None)
        if not isinstance(log, DistillationLog):
            yield
            return
        log.later = True
        try:
            yield
            log.write()
        finally:
            log.later = False

    def _clip_gradients(self) -> Tensor:
        """Limit the gradient's norm, and return what it was, unread."""
        self.grad_scaler.unscale_(self.optimizer)
        if self.clip_grad_norm is not None:
            norms = [nn.utils.clip_grad_norm_(p, self.clip_grad_norm) for p in self._clipped]
            return torch.linalg.vector_norm(torch.stack(norms))
        # clip_grad_norm_ would go over all gradients once more, to multiply them by 1.
        return _total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def _read(
        self, parts: list[dict[str, Tensor]], norm: Tensor
    ) -> tuple[dict[str, list[float]], float]:
        """Each loss of each part, by name, and the norm, in one transfer from the device."""
        losses = [loss for part in parts for loss in part.values()]
        numbers = torch.stack([*losses, norm.to(losses[0])]).tolist()
        values: dict[str, list[float]] = {}
        for name, number in zip((n for part in parts for n in part), numbers, strict=False):
            values.setdefault(name, []).append(number)
        return values, numbers[-1]

    def _check_norm(self, norm: float) -> None:
        """Tell the gradient's norm, and raise before an infinite one reaches the weights.

        Without a limit too: a loss may be finite and its gradient not, and the next checkpoint
        would hold weights that are no numbers.
        """
        if math.isfinite(norm):
            self.storage.put_scalar("grad_norm", norm)
        elif not self.grad_scaler.is_enabled():  # Which leaves out such a step.
            raise UserError(
                f"the gradient's norm is {norm} at iteration {self.iter}, though the losses are "
                "finite: the weights were not touched; lower optimizer.lr or model.head.weight"
            )

    def _update_scale(self) -> None:
        """Adapt the scale of fp16 losses, and tell it: it halves with every step left out."""
        self.grad_scaler.update()
        if not self.grad_scaler.is_enabled():
            return
        scale = self.grad_scaler.get_scale()
        if scale < _MIN_GRAD_SCALE:
            raise UserError(
                f"fp16 gradients are not finite at iteration {self.iter}, however small the loss "
                "is scaled: no step can be taken; use train.amp.dtype=bf16"
            )
        self.storage.put_scalar("grad_scale", scale, smoothing_hint=False)

    def _check_finite(self, values: dict[str, list[float]]) -> None:
        """Raise before a loss that is no number reaches the weights."""
        for name, numbers in values.items():
            value = next((number for number in numbers if not math.isfinite(number)), None)
            if value is None:
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
            if key.startswith(prefix) and not math.isfinite(value)
        ]
        return f", term {', '.join(terms)}" if terms else ""

    def state_dict(self) -> dict:
        state = super().state_dict()
        # Detectron2 keeps that of the first hook of each class.
        hooks = {name: hook.state_dict() for name, hook in _named_hooks(self._hooks)}
        state["hooks"] = {name: held for name, held in hooks.items() if held}
        state["grad_scaler"] = self.grad_scaler.state_dict()
        state["scalars"] = recent_scalars(self.storage)
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        self._check_groups(state_dict["optimizer"]["param_groups"])
        # The hooks come later, and Detectron2 would miss them.
        self._resumed_hooks = dict(state_dict.get("hooks", {}))
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "hooks"})
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self._resumed_scalars = state_dict["scalars"]

    def _check_groups(self, saved: list[dict[str, Any]]) -> None:
        """Optimizers find a parameter's state by its place alone: compare the names."""
        for own, other in zip(self.optimizer.param_groups, saved, strict=False):
            names, other_names = own.get("param_names"), other.get("param_names")
            if names != other_names:
                raise ValueError(
                    f"the parameters of optimizer group {own.get('name')} are not those of the "
                    f"saved {other.get('name')}"
                )


def _parts(model: nn.Module) -> list[list[nn.Parameter]]:
    """The student's parameters, or those of a plain detector; then those of a distillation head."""
    if not isinstance(model, DistilledDetector):
        return [list(model.parameters())]
    head = list(model.head.parameters())
    apart = {id(parameter) for parameter in head}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in apart]
    # Of one that has no gradient, torch would give the norm on another device.
    return [part for part in (rest, head) if any(p.requires_grad for p in part)]


def _named_hooks(hooks: Iterable[HookBase]) -> Iterator[tuple[str, HookBase]]:
    """Each hook with its class's name; the second of a class with #2 behind it, and so on."""
    seen: Counter[str] = Counter()
    for hook in hooks:
        name = type(hook).__qualname__
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}#{seen[name]}", hook


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """The L2 norm over all gradients."""
    if hasattr(nn.utils, "get_total_norm"):  # Since torch 2.6; all tensors in one kernel.
        return nn.utils.get_total_norm(gradients)
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

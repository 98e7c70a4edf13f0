"""How much of the gradient that reaches the student's features may be distillation's.

At the tapped features the graph parts: one branch goes to the student's own losses, one to the
distillation head. Both gradients come back there in the one backward pass, so they can be compared
and the head's be scaled, exactly and without state. What is above, the adapters and the parameters
of criteria, keeps the gradient of the loss as it is.

The equations are this project's own; see docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..ranges import check_choice, is_number
from .processes import sum_over_processes

MODES = ("cap", "target")
_UNLABELLED = "unlabelled/"
SCOPES = ("all", "level")


class GradientShare:
    """Holds the head's gradient at the features to a share of the labels' gradient there.

    With t and d the labels' and the distillation's gradient, over all levels together or on each,
    the features are given t + f d, where

        cap:     f = min(1, share |t| / |d|)
        target:  f = share |t| / |d|

    and, with ``drop_conflict``, d without its part along -t where the two point apart (d.t < 0).
    Under several processes the norms are those of the whole batch.
    """

    def __init__(
        self,
        share: float,
        *,
        mode: str = "cap",
        over: str = "all",
        drop_conflict: bool = False,
    ) -> None:
        """
        Args:
            share: above 0; inf measures and changes nothing.
            mode: "cap" limits the head's gradient, "target" sets its length.
            over: "all": one factor for all levels of a module; "level": one for each. A level of
                which the labels' losses know nothing takes the factor of all.
            drop_conflict: take the part out that opposes the labels' gradient.

        Raises:
            UserError: a value outside its range.
        """
        finite = is_number(share)
        if not (finite or (share == math.inf and mode != "target")) or share <= 0:
            raise UserError(
                f"model.head.gradient_share is {share!r}; it must be a number above 0"
                f"{' and finite' if mode == 'target' else ', inf or null for no limit'}"
            )
        for key, value, allowed in (("mode", mode, MODES), ("over", over, SCOPES)):
            check_choice(f"model.head.gradient_share_{key}", value, allowed)
        self.share = share
        self.mode = mode
        self.over = over
        self.drop_conflict = drop_conflict
        self._measured: list[tuple[list[str], Tensor]] = []

    def split(
        self,
        features: Mapping[str, Tensor],
        warmup: float = 1.0,
        unlabelled: dict[str, Tensor] | None = None,
        levels: Collection[str] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The features of one module, once for the detector and once for the head.

        Args:
            warmup: multiplies the share; from 0 to 1.
            unlabelled: those of images that the labels' losses do not see, of this module and of
                others. The distillation of both is held to the labels' gradient; what the head is
                to have of them takes their place.
            levels: those that are distilled; the labels' gradient at others has no part in it.
                None: all.
        """
        both = dict(features)
        for name in features:
            if unlabelled is not None and name in unlabelled:
                both[f"{_UNLABELLED}{name}"] = unlabelled[name]
        for_detector, for_head = dict(both), dict(both)
        names = [
            name
            for name, feature in both.items()
            if getattr(feature, "requires_grad", False)  # Some backbones put out more than maps.
            and (levels is None or _level(name) in levels)
        ]
        if names:
            split = _Split.apply(self, names, warmup, *(both[name] for name in names))
            for_detector.update(zip(names, split[: len(names)], strict=True))
            for_head.update(zip(names, split[len(names) :], strict=True))
        if unlabelled is not None:
            mine = [name for name in features if name in unlabelled]
            unlabelled.update({name: for_head[f"{_UNLABELLED}{name}"] for name in mine})
        return tuple({n: x[n] for n in features} for x in (for_detector, for_head))

    def take_measured(self) -> list[tuple[list[str], Tensor]]:
        """What the backward passes since the last call measured: names and their values."""
        measured, self._measured = self._measured, []
        return measured

    def mix(
        self,
        names: Sequence[str],
        warmup: float,
        labels: Sequence[Tensor | None],
        distilled: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """The gradient of each feature, from that of either branch."""
        pairs = list(zip(labels, distilled, strict=True))
        products = sum_over_processes(torch.stack([_products(t, d, pairs) for t, d in pairs]))
        together = products.sum(dim=0).expand_as(products)
        along, factor = self._factors(together, warmup)
        if self.over == "level":
            same = products.new_tensor([[_level(a) == _level(b) for b in names] for a in names])
            own = same @ products  # Images without labels are held to the labels' of their level.
            # The labels' losses may not know a level, which then has nothing to be held to.
            known = own[:, 0] > 0
            own_along, own_factor = self._factors(own, warmup)
            along, factor = own_along.where(known, along), own_factor.where(known, factor)
        self._measure(names, products, factor)
        mixed = []
        for i, (t, d) in enumerate(pairs):
            if t is None or d is None:
                mixed.append(d * factor[i] if t is None and d is not None else t)
                continue
            if self.drop_conflict:
                d = d - along[i] * t
            mixed.append(t + factor[i] * d)
        return mixed

    def _factors(self, products: Tensor, warmup: float) -> tuple[Tensor, Tensor]:
        """What to take of t from d, and what to multiply the rest by: (L,) each, of (L,3)."""
        tt, dd, td = products.unbind(dim=1)
        along = torch.zeros_like(td)
        if self.drop_conflict:
            along = torch.where(tt > 0, td.clamp(max=0) / tt, 0)
            dd = (dd - along * td).clamp(min=0)
        factor = self.share * warmup * (tt / dd).sqrt()
        if self.mode == "cap":
            factor = factor.clamp(max=1)
        # Without one of the two there is nothing to compare.
        return along, torch.where((tt > 0) & (dd > 0), factor, 1)

    def _measure(self, names: Sequence[str], products: Tensor, factor: Tensor) -> None:
        tt, dd, td = products.unbind(dim=1)
        # The labels' losses do not see images without labels: those of their level are the measure.
        own = [names.index(_level(n)) if _level(n) in names else i for i, n in enumerate(names)]
        beside = torch.stack([tt[i] for i in own])  # A list as index would wait for the device.
        ratio = torch.where(beside > 0, (dd / beside).sqrt(), 0)
        cosine = torch.where((tt > 0) & (dd > 0), td / (tt.sqrt() * dd.sqrt()), 0)
        shown = {
            f"dfd/{name.replace('/', '_')}/gradient_{what}": values[i]
            for what, values in (("ratio", ratio), ("cosine", cosine), ("factor", factor))
            for i, name in enumerate(names)
            if not (what == "cosine" and name.startswith(_UNLABELLED))
        }
        self._measured.append((list(shown), torch.stack(list(shown.values()))))


def make_gradient_share(
    share: float | None, mode: str, over: str, drop_conflict: bool
) -> GradientShare | None:
    """As :class:`GradientShare` takes them; None if there is no limit.

    Raises:
        UserError: a value outside its range, or one that would have no effect without a share.
    """
    if share is not None:
        return GradientShare(share, mode=mode, over=over, drop_conflict=drop_conflict)
    if drop_conflict:
        raise UserError(
            "model.head.drop_conflict is True, which needs a gradient_share: set "
            "model.head.gradient_share=inf for no limit beside it"
        )
    if mode == "target":
        raise UserError(
            "model.head.gradient_share_mode is 'target', but gradient_share is null: give it "
            "a number"
        )
    return None


def _level(name: str) -> str:
    return name.removeprefix(_UNLABELLED)


def _products(
    t: Tensor | None, d: Tensor | None, pairs: Sequence[tuple[Tensor | None, Tensor | None]]
) -> Tensor:
    """(3,): t.t, d.d and t.d in fp32."""
    zero = next(x for pair in pairs for x in pair if x is not None).new_zeros((), dtype=torch.float)
    t, d = (None if x is None else x.float().flatten() for x in (t, d))
    both = t is not None and d is not None
    return torch.stack(
        [
            zero if t is None else t.dot(t),
            zero if d is None else d.dot(d),
            t.dot(d) if both else zero,
        ]
    )


class _Split(torch.autograd.Function):
    """Features, twice; backward gets both gradients of all of them at the same time."""

    @staticmethod
    def forward(
        ctx: Any, share: GradientShare, names: list[str], warmup: float, *features: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.share, ctx.names, ctx.warmup = share, names, warmup
        # Most of the graph may miss a branch: no zeros are made for it.
        ctx.set_materialize_grads(False)
        # Not views, of which autograd lets nobody change one of several in place.
        return tuple(feature.detach() for _ in range(2) for feature in features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        half = len(ctx.names)
        mixed = ctx.share.mix(ctx.names, ctx.warmup, gradients[:half], gradients[half:])
        return None, None, None, *mixed

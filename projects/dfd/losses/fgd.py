"""FGD: foreground and background apart, weighted by the teacher's attention, and global relations.

Shape shorthand: N images, C channels, H x W cells of one level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distill.disparity import zero_outside
from ..errors import UserError
from ..ranges import check_number, check_positive
from .base import FeatureCriterion, LevelFeatures, hide_invalid, sum_over_cells

# Boxes whose cells are marked in one go.
_AT_ONCE = 32


class FGDLoss(FeatureCriterion):
    """L = alpha_fgd L_fg + beta_fgd L_bg + gamma_fgd L_att + lambda_fgd L_rel.

    With the attention of cells A^S = n softmax over the n valid cells of mean_c |F| / temp, and of
    channels A^C = C softmax over channels of the mean over valid cells of |F| / temp,

        L_fg  = 1/N sum M_fg A^S(T) A^C(T) (S - T)^2,   L_bg the same with M_bg,
        L_att = 1/N (sum |A^S(S) - A^S(T)| + sum |A^C(S) - A^C(T)|),
        L_rel = 1/N sum (R_S(S) - R_T(T))^2,   R a learnt :class:`GlobalContext`.

    M_fg is, in the cells of a labelled box, 1 over their number (the largest where boxes overlap),
    else 0; M_bg is 1 over the number of cells outside of all boxes there, else 0.

    Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022, in the form of
    the authors' code. As there all are sums over cells, so weights mean something else at another
    resolution or number of channels; ``reference_size`` takes the resolution out. Deviations:
    padding is left out of every softmax and sum, and boxes are placed by the level's stride, where
    the original scales by the size of the image and so misplaces boxes where images are padded.
    """

    def __init__(
        self,
        *,
        channels: int | None = None,
        temp: float = 0.5,
        alpha_fgd: float = 1e-3,
        beta_fgd: float = 5e-4,
        gamma_fgd: float = 5e-4,
        lambda_fgd: float = 5e-6,
        reference_size: float | None = None,
    ) -> None:
        """
        Args:
            channels: C; the head fills it in.
            temp: temperature of the attention, > 0.
            alpha_fgd, beta_fgd, gamma_fgd, lambda_fgd: weights of foreground, background,
                attention and relations, >= 0. The defaults are those published for RetinaNet;
                5e-5, 2.5e-5, 5e-5, 5e-7 for Faster and Mask R-CNN.
            reference_size: the loss is divided by the area of the batch's images, in pixels, over
                that of a square of this side, as the authors do under YOLOX's changing sizes (640
                there); None: it is not divided.
        """
        super().__init__()
        self.alpha_fgd = check_number("FGDLoss: alpha_fgd", alpha_fgd)
        self.beta_fgd = check_number("FGDLoss: beta_fgd", beta_fgd)
        self.gamma_fgd = check_number("FGDLoss: gamma_fgd", gamma_fgd)
        self.lambda_fgd = check_number("FGDLoss: lambda_fgd", lambda_fgd)
        self.temp = check_positive("FGDLoss: temp", temp)
        if reference_size is not None:
            check_positive("FGDLoss: reference_size", reference_size)
        self.reference_size = reference_size
        self.student_context: GlobalContext | None = None
        self.teacher_context: GlobalContext | None = None
        if channels is not None:
            self.set_channels(channels)

    def set_channels(self, channels: int) -> None:
        if self.student_context is None:
            self.student_context = GlobalContext(channels)
            self.teacher_context = GlobalContext(channels)

    def forward(self, level: LevelFeatures) -> Tensor:
        valid = level.valid
        if self.student_context is None:
            raise UserError("FGDLoss needs channels=C when used without a head")
        student, teacher = (zero_outside(x, valid) for x in (level.student, level.teacher))
        images = len(student)
        cells_s, channels_s = self._attention(student, valid)
        cells_t, channels_t = self._attention(teacher, valid)
        cost = ((student - teacher).square() * channels_t[:, :, None, None]).sum(dim=1)
        foreground, background = box_masks(level.boxes, level.stride, cost, valid)
        # Weights before sums, which could leave the range of fp32 without them.
        foreground = self.alpha_fgd * foreground * cells_t
        background = self.beta_fgd * background * cells_t
        terms = {
            "foreground": sum_over_cells(cost * foreground, valid),
            "background": sum_over_cells(cost * background, valid),
            "attention": self.gamma_fgd
            * (
                sum_over_cells((cells_s - cells_t).abs(), valid)
                + (channels_s - channels_t).abs().sum()
            ),
            "relation": self._relation(student, teacher, valid),
        }
        self.stats = {f"term_{name}": term.detach() / images for name, term in terms.items()}
        total = sum(terms.values()) / images
        if self.reference_size is None:
            return total
        area = student.shape[-2] * student.shape[-1] * level.stride**2
        return total * (self.reference_size**2 / area)

    def _attention(self, features: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention of cells (N,H,W), 0 where not valid, and of channels (N,C).

        Args:
            features: zero outside.
        """
        size = features.abs()
        images, channels, height, width = size.shape
        logits = hide_invalid(size.mean(dim=1) / self.temp, valid)
        if valid is None:
            mean, cells = size.mean(dim=(2, 3)), height * width
        else:
            cells = valid.sum(dim=(1, 2)).view(-1, 1, 1)
            mean = size.sum(dim=(2, 3)) / cells.view(-1, 1).clamp(min=1)
        of_cells = cells * F.softmax(logits.flatten(1), dim=1).view(images, height, width)
        return of_cells, channels * F.softmax(mean / self.temp, dim=1)

    def _relation(self, student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
        s = student + self.student_context(student, valid)
        t = teacher + self.teacher_context(teacher, valid)
        return sum_over_cells(self.lambda_fgd * (s - t).square().sum(dim=1), valid)


class GlobalContext(nn.Module):
    """What FGD adds to every cell: W2(ReLU(LayerNorm(W1(sum_j softmax_j(W F_j) F_j)))), W2 zero at
    first (a block of Cao et al., "GCNet", ICCVW 2019)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 2)
        self.mask = nn.Conv2d(channels, 1, 1)
        self.reduce = nn.Linear(channels, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.expand = nn.Linear(hidden, channels)
        nn.init.kaiming_normal_(self.mask.weight, mode="fan_in", nonlinearity="relu")
        for parameter in (self.mask.bias, self.expand.weight, self.expand.bias):
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor, valid: Tensor | None) -> Tensor:
        """(N,C,H,W), finite everywhere, to (N,C,1,1)."""
        cells = None if valid is None else valid.flatten(1)
        logits = hide_invalid(self.mask(features).flatten(1), cells)
        context = (features.flatten(2) * F.softmax(logits, dim=1).unsqueeze(1)).sum(dim=2)
        return self.expand(F.relu(self.norm(self.reduce(context))))[:, :, None, None]


def _between(places: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """(M,S) bool: which of S places are from the start to before the end of each of M ranges."""
    return (places >= starts[:, None]) & (places < ends[:, None])


@torch.no_grad()
def box_masks(
    boxes: Sequence[Tensor] | None, stride: int, like: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights of the cells of boxes and of the others, by which every object counts the same.

    In the cells of a box, 1 over their number (the largest where boxes overlap), else 0; and 1 over
    the number of cells of the image outside of all boxes there, else 0.

    Args:
        boxes: N tensors (M,4), XYXY in pixels of the network's input; None: no boxes.
        stride: pixels per cell.
        like: (N,H,W), for size and device.

    Returns:
        M_fg and M_bg, (N,H,W).
    """
    foreground = torch.zeros_like(like)
    rows, columns = (torch.arange(size, device=like.device) for size in like.shape[1:])
    for mask, of_image in zip(foreground, boxes or (), strict=bool(boxes)):
        # Some at a time, so that a crowd of objects does not take the memory of a map each.
        for some in of_image.split(_AT_ONCE) if len(of_image) else ():
            corners = some / stride
            # The cell in which the box ends is in, and if it ends on a border, the next one.
            left, top = corners[:, :2].floor().unbind(dim=1)
            right, bottom = (corners[:, 2:].ceil() + 1).unbind(dim=1)
            share = ((bottom - top) * (right - left)).reciprocal().to(like.dtype)
            down, across = _between(rows, top, bottom), _between(columns, left, right)
            inside = down[:, :, None] & across[:, None, :]
            weights = torch.where(inside, share[:, None, None], 0)
            torch.maximum(mask, weights.amax(dim=0), out=mask)
    background = (foreground == 0).to(like.dtype)
    if valid is not None:
        background = background * valid
    return foreground, background / background.sum(dim=(1, 2), keepdim=True).clamp(min=1)

"""Margins of the positive class: ArcFace, CosFace and their combination (docs/methods/bigface.md).

cos θ → cos(m1·θ + m2) − m3 (ArcFace: Deng et al., CVPR 2019, Eq. 4).

Legend: B faces, G faces of the global batch, D embedding.
"""

import math
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor, nn

from fr_core.config.methods import AnyMargin, Margin

MIN_SINE = 1e-4  # caps dθ/dcos = −1/sin θ near θ = 0 and π, where d cos/dx vanishes like sin θ


@dataclass(frozen=True)
class FaceMargin:
    """A :class:`fr_core.config.methods.Margin` whose m2 and m3 may differ from face to face [G]."""

    scale: float
    m1: float
    m2: float | Tensor
    m3: float | Tensor
    gradient: Literal["exact", "straight_through"] = "exact"
    past_pi: Literal["fallback", "wrap"] = "fallback"


class FixedMargin(nn.Module):
    """The same margin for every face."""

    def __init__(self, margin: Margin) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, x_GD: Tensor) -> Margin:
        """Return the margin of the faces of a step.

        Args:
            x_GD: embeddings of all ranks, not normalised: their lengths tell how good the faces are.
        """
        return self.margin


def make_margin(margin: AnyMargin) -> nn.Module:
    """Return the module of a margin's section. The head saves and restores the module's buffers, if it has any."""
    match margin:
        case Margin():
            return FixedMargin(margin)
        case _ as unknown:
            assert_never(unknown)


def with_margin(cos_B: Tensor, margin: Margin | FaceMargin) -> tuple[Tensor, Tensor]:
    """Return the positive cosine after the margin, before the scale, and its derivative by the cosine.

    ``margin.gradient``: ``"exact"`` differentiates the formula, m1·sin(m1·θ + m2)/sin θ. ``"straight_through"`` treats
    the margin as a constant, as the widely used public code does: the loss is the same, the update is not.

    ``margin.past_pi``: where m1·θ + m2 > π the cosine would rise again. ``"wrap"`` lets it rise; ``"fallback"``
    continues downwards. For m1 = 1 it uses ArcFace's cos θ − m2·sin(m2) (Deng et al., CVPR 2019). For other m1 it uses
    the line of slope 1 through (cos θ0, −1), where m1·θ0 + m2 = π.

    Args:
        cos_B: float [B]; values beyond ±1 are clamped.

    Returns:
        value [B] and slope [B].
    """
    cos_B = cos_B.clamp(-1, 1)
    theta = torch.acos(cos_B)
    m1, m2 = margin.m1, margin.m2
    angle = m1 * theta + m2
    value = torch.cos(angle)
    slope = m1 * torch.sin(angle) / torch.sin(theta).clamp_min(MIN_SINE)
    if m1 == 1 and isinstance(m2, float | int) and m2 == 0:
        value, slope = cos_B, torch.ones_like(cos_B)
    elif margin.past_pi == "fallback":
        past = angle > math.pi
        functions = torch if isinstance(m2, Tensor) else math
        drop = m2 * functions.sin(m2) if m1 == 1 else 1 + functions.cos((math.pi - m2) / m1)
        value = torch.where(past, cos_B - drop, value)
        slope = torch.where(past, 1.0, slope)
    if margin.gradient == "straight_through":
        slope = torch.ones_like(slope)
    return value - margin.m3, slope

"""Margins of the positive class: ArcFace, CosFace and their combination (METHODS §1).

cos θ → cos(m1·θ + m2) − m3. Legend: B faces, G faces of the global batch, D embedding.
"""

import math
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor, nn

from fr_core.config.methods import AnyMargin, Margin

MIN_SINE = 1e-4  # below it dθ/dcos is capped; its product with d cos/dx, which carries sin θ, vanishes there anyway


@dataclass(frozen=True)
class FaceMargin:
    """A :class:`fr_core.config.methods.Margin` whose m2 and m3 may be numbers of their own for each face [G]."""

    scale: float
    m1: float
    m2: float | Tensor
    m3: float | Tensor
    gradient: Literal["exact", "straight_through"] = "exact"
    past_pi: Literal["fallback", "wrap"] = "fallback"


class FixedMargin(nn.Module):
    """One margin for every face, whatever its embedding."""

    def __init__(self, margin: Margin) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, x_GD: Tensor) -> Margin:
        """The margin of each face of a step.

        Args:
            x_GD: all ranks' embeddings, not normalised: their lengths tell how good the faces are.
        """
        return self.margin


def make_margin(margin: AnyMargin) -> nn.Module:
    """The module of a margin's section. It may hold buffers, which the head saves and takes back with its own."""
    match margin:
        case Margin():
            return FixedMargin(margin)
        case _ as unknown:
            assert_never(unknown)


def with_margin(cos_B: Tensor, margin: Margin | FaceMargin) -> tuple[Tensor, Tensor]:
    """The positive's cosine after the margin, before the scale, and its derivative by the cosine.

    ``margin.gradient = "exact"`` differentiates the formula: m1·sin(m1·θ + m2)/sin θ. ``"straight_through"`` passes
    the gradient as if the margin were a constant, as the widely used public code does (same loss, another update).
    Where m1·θ + m2 > π, ``"fallback"`` continues downwards instead of letting the cosine rise again: for m1 = 1
    with ArcFace's cos θ − m2·sin(m2) (Deng et al., 2019), else with the line of slope 1 through (θ0, −1).

    Args:
        cos_B: float [B]; rounding beyond ±1 is cut off.

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

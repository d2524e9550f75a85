"""Margins of the positive class: ArcFace, CosFace and their combination (METHODS §1).

cos θ → cos(m1·θ + m2) − m3. Legend: B faces.
"""

import math

import torch
from torch import Tensor

from fr_core.config import Margin

MIN_SINE = 1e-4  # below it dθ/dcos is capped; its product with d cos/dx, which carries sin θ, vanishes there anyway


def with_margin(cos_B: Tensor, margin: Margin) -> tuple[Tensor, Tensor]:
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
    angle = margin.m1 * theta + margin.m2
    value = torch.cos(angle)
    slope = margin.m1 * torch.sin(angle) / torch.sin(theta).clamp_min(MIN_SINE)
    if margin.m1 == 1 and margin.m2 == 0:
        value, slope = cos_B, torch.ones_like(cos_B)
    elif margin.past_pi == "fallback":
        past = angle > math.pi
        drop = margin.m2 * math.sin(margin.m2) if margin.m1 == 1 else 1 + math.cos((math.pi - margin.m2) / margin.m1)
        value = torch.where(past, cos_B - drop, value)
        slope = torch.where(past, 1.0, slope)
    if margin.gradient == "straight_through":
        slope = torch.ones_like(slope)
    return value - margin.m3, slope

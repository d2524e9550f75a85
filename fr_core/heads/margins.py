"""The positive cosine after a margin, and what a margin may depend on (docs/methods/margins.md).

cos θ → cos(m1·θ + m2) − m3 (ArcFace: Deng et al., CVPR 2019, Eq. 4).

Legend: B faces, G faces of the global batch, D embedding.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fr_core.config.methods import Margin

MIN_SINE = 1e-4  # caps dθ/dcos = −1/sin θ near θ = 0 and π, where d cos/dx vanishes like sin θ


class Hard(NamedTuple):
    """Negatives with a cosine above a face's threshold have the logit s·cos·(t + cos) (CurricularFace, 2020)."""

    above_G: Tensor
    """Each face's threshold."""
    t: Tensor
    """Scalar on the device."""


class Threshold(NamedTuple):
    """The loss is no softmax, but Σ softplus over the classes, at a threshold b (UniFace, 2023)."""

    bias: Tensor
    """b, a scalar on the device."""
    balance: float
    """λ: weight of the negatives."""
    gradient: Tensor
    """Scalar, into which the loss writes its derivative by b."""


@dataclass(frozen=True)
class FaceMargin:
    """A :class:`fr_core.config.methods.Margin` whose m2 and m3 may differ from face to face [G].

    Args:
        m2: the loss has a gradient by it, if it requires one; then m1 = 1.
        past_pi: as the margin's; ``"clamp"`` holds the angle in 0 … π, and ``"easy"`` has no margin beyond 90°.
        hard: the rule for hard negatives; None: all negatives have the logit s·cos.
        threshold: the loss is a sum at this threshold; None: a softmax.
        extra_G: a further loss of each face, of which the mean is added; None: there is none.
    """

    scale: float
    m1: float
    m2: float | Tensor
    m3: float | Tensor
    gradient: Literal["exact", "straight_through"] = "exact"
    past_pi: Literal["fallback", "wrap", "clamp", "easy"] = "fallback"
    hard: Hard | None = None
    threshold: Threshold | None = None
    extra_G: Tensor | None = None


class Faces(NamedTuple):
    """What the margins of a step's faces may depend on; the same on all ranks."""

    x_GD: Tensor
    """Embeddings, not normalised, with gradient: their lengths tell how good the faces are."""
    cos_G: Tensor | None = None
    """Cosine of each face with its class, without gradient, for margins that state ``sees_cosines``."""
    drawn_G: Tensor | None = None
    """Standard normal numbers, for modules that ``draws``."""
    labels_G: Tensor | None = None
    """int64, the class of each face."""


class FaceMargins(nn.Module):
    """Base of the modules that give each face its margin. The head saves and restores their buffers.

    The embeddings of a step's micro-batches come one after another. A moving average moves once for each.
    """

    draws: ClassVar[bool] = False
    """The module needs random numbers."""

    def forward(self, faces: Faces) -> FaceMargin:
        """Return the margins of a step's faces."""
        raise NotImplementedError

    def learn(self, margin: FaceMargin) -> None:
        """Learn from the loss that the margin of :meth:`forward` had."""


class FixedMargin(FaceMargins):
    """The same margin for every face."""

    def __init__(self, margin: Margin) -> None:
        super().__init__()
        self.margin = FaceMargin(**margin.model_dump(exclude={"kind"}))

    def forward(self, faces: Faces) -> FaceMargin:
        """Return the margin."""
        return self.margin


def with_margin(cos_B: Tensor, margin: Margin | FaceMargin) -> tuple[Tensor, Tensor]:
    """Return the positive cosine after the margin, before the scale, and its derivative by the cosine.

    ``margin.gradient``: ``"exact"`` differentiates the formula, m1·sin(m1·θ + m2)/sin θ. ``"straight_through"`` treats
    the margin as a constant, as the widely used public code does: the loss is the same, the update is not.

    ``margin.past_pi``: where m1·θ + m2 > π the cosine would rise again. ``"wrap"`` lets it rise; ``"fallback"``
    continues downwards. For m1 = 1 it uses ArcFace's cos θ − m2·sin(m2) (Deng et al., CVPR 2019). For other m1 it uses
    the line of slope 1 through (cos θ0, −1), where m1·θ0 + m2 = π. ``"clamp"`` and ``"easy"``: see :class:`FaceMargin`.

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
    elif margin.past_pi == "clamp":
        value = torch.cos(angle.clamp(0, math.pi))
        slope = torch.where((angle < 0) | (angle > math.pi), 0.0, slope)
    elif margin.past_pi == "easy":
        value = torch.where(cos_B > 0, value, cos_B)
        slope = torch.where(cos_B > 0, slope, 1.0)
    if margin.gradient == "straight_through":
        slope = torch.ones_like(slope)
    return value - margin.m3, slope


def slope_by_m2(cos_B: Tensor, margin: FaceMargin) -> Tensor:
    """Return the derivative of :func:`with_margin`'s value by m2 [B], for m1 = 1 and margins that end in a tensor m2.

    Args:
        cos_B: float [B]; values beyond ±1 are clamped.
    """
    cos_B, m2 = cos_B.clamp(-1, 1), torch.as_tensor(margin.m2)
    angle = torch.acos(cos_B) + m2
    slope = -torch.sin(angle)
    match margin.past_pi:
        case "fallback":
            return torch.where(angle > math.pi, -torch.sin(m2) - m2 * torch.cos(m2), slope)
        case "clamp":
            return torch.where((angle < 0) | (angle > math.pi), 0.0, slope)
        case "easy":
            return torch.where(cos_B > 0, slope, 0.0)
        case "wrap":
            return slope

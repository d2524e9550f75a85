import math

import pytest
import torch

from fr_core.config.methods import Margin
from fr_core.heads.margins import with_margin

COSINES = torch.linspace(-0.99, 0.99, 41, dtype=torch.float64)
KINDS = {
    "arcface": Margin(m2=0.5, m3=0),
    "cosface": Margin(m3=0.4),
    "combined": Margin(m1=1.2, m2=0.3, m3=0.2),
}


def reference(cos, margin):
    """The formula, differentiated by autograd through acos."""
    theta = torch.acos(cos)
    angle = margin.m1 * theta + margin.m2
    value = torch.cos(angle) - margin.m3
    if margin.m2 and margin.past_pi == "fallback":
        drop = margin.m2 * math.sin(margin.m2) if margin.m1 == 1 else 1 + math.cos((math.pi - margin.m2) / margin.m1)
        value = torch.where(angle > math.pi, cos - drop - margin.m3, value)
    return value


@pytest.mark.parametrize("past_pi", ["fallback", "wrap"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_exact_slopes(kind, past_pi):
    margin = KINDS[kind].model_copy(update={"past_pi": past_pi})
    cos = COSINES.clone().requires_grad_()
    expected = reference(cos, margin)
    expected.sum().backward()
    value, slope = with_margin(COSINES, margin)
    assert torch.allclose(value, expected, atol=1e-12)
    assert torch.allclose(slope, cos.grad, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_straight_through_has_the_same_value_and_slope_one(kind):
    value, slope = with_margin(COSINES, KINDS[kind].model_copy(update={"gradient": "straight_through"}))
    assert torch.equal(value, with_margin(COSINES, KINDS[kind])[0])
    assert torch.equal(slope, torch.ones_like(COSINES))


def test_arcface_by_hand():
    """With a margin of 30°, cos 60° becomes cos 90°. Its slope is sin 90° / sin 60°."""
    value, slope = with_margin(torch.tensor([0.5], dtype=torch.float64), Margin(m2=math.pi / 6, m3=0))
    assert float(value) == pytest.approx(0, abs=1e-12)
    assert float(slope) == pytest.approx(2 / math.sqrt(3))


@pytest.mark.parametrize("kind", KINDS)
def test_the_fallback_never_rises_as_faces_grow_apart(kind):
    cos = torch.cos(torch.linspace(0, math.pi, 2000, dtype=torch.float64))
    assert (with_margin(cos, KINDS[kind])[0].diff() <= 1e-12).all()
    wrapped, _ = with_margin(cos, KINDS["arcface"].model_copy(update={"past_pi": "wrap"}))
    assert (wrapped.diff() > 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_are_finite(kind):
    for found in with_margin(torch.tensor([-1.0, 1.0, -1 - 1e-6, 1 + 1e-6]), KINDS[kind]):
        assert found.isfinite().all()

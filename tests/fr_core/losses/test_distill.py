import numpy as np
import pytest
import torch

from fr_core.losses.distill import distillation_loss


def by_hand(form, student, teacher):
    """Return the mean distance, computed image by image (docs/methods/bigface.md)."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        s, t = s / np.sqrt(sum(s * s)), t / np.sqrt(sum(t * t))
        total += sum((t - s) ** 2) if form == "euclidean" else (1 - sum(s * t)) ** 2
    return total / len(student)


def slope_by_hand(form, student, teacher):
    """Return d by_hand / d student, through cos = s·t / (‖s‖·‖t‖)."""
    grads = []
    for s, t in zip(student, teacher, strict=True):
        length, t = np.linalg.norm(s), t / np.linalg.norm(t)
        cos = s @ t / length
        d_cos = (t - cos * s / length) / length
        grads.append((-2 if form == "euclidean" else -2 * (1 - cos)) * d_cos / len(student))
    return np.array(grads)


@pytest.mark.parametrize("form", ["euclidean", "angular"])
def test_loss_and_gradient_are_those_of_the_formula(form):
    random = np.random.default_rng(0)
    student, teacher = random.normal(size=(5, 7)), 3 * random.normal(size=(5, 7))
    x = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    loss = distillation_loss(form, x, torch.tensor(teacher))
    loss.backward()
    assert loss.item() == pytest.approx(by_hand(form, student, teacher), rel=1e-5)
    assert np.allclose(x.grad, slope_by_hand(form, student, teacher), atol=1e-6)


@pytest.mark.parametrize(("form", "opposite"), [("euclidean", 4), ("angular", 4)])
def test_ends_of_the_range(form, opposite):
    x = torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16)
    assert distillation_loss(form, x, 2 * x).item() == pytest.approx(0, abs=1e-6)
    assert distillation_loss(form, x, -x).item() == pytest.approx(opposite, rel=1e-6)
    assert distillation_loss(form, x, 2 * x).dtype == torch.float32

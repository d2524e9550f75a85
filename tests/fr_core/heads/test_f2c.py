import math

import pytest
import torch
from torch.nn import functional as F

from fr_core.config.methods import Margin
from fr_core.heads.f2c import ClassPool
from fr_core.heads.streamed import Softmax

MARGIN = Margin(scale=8, m3=0.2)


def pool_of(slots, embedding=4):
    return ClassPool(slots, embedding, Softmax(MARGIN, tile=3), seed=0)


class Reference:
    """The pool with both layers in full, and a list for the order of use."""

    def __init__(self, pool):
        self.layers = [pool.first_QD.double().clone(), pool.first_QD.double().clone()]
        self.held, self.latest, self.used = {}, {}, []  # label -> slot, slot -> layer, labels by use

    def put(self, centres, labels):
        for centre, label in zip(centres.double(), labels.tolist(), strict=True):
            if label in self.held:
                slot = self.held[label]
                self.latest[slot] = 1 - self.latest[slot]
                self.used.remove(label)
            else:
                free = set(range(len(self.layers[0]))) - set(self.held.values())
                slot = min(free) if free else self.held.pop(self.used.pop(0))
                self.held[label], self.latest[slot] = slot, 0
            self.used.append(label)
            self.layers[self.latest[slot]][slot] = centre

    def views(self):
        """Return layer 0, and the layer that was written last."""
        slots = range(len(self.layers[0]))
        last = [self.layers[self.latest[s]][s] if s in self.latest else self.layers[0][s] for s in slots]
        return self.layers[0], torch.stack(last)

    def loss(self, x, labels):
        total = 0.0
        for layer in self.views():
            for f, label in zip(x.double(), labels.tolist(), strict=True):
                cos = layer @ (f / f.norm())
                if label in self.held:
                    logits = MARGIN.scale * cos
                    logits[self.held[label]] -= MARGIN.scale * MARGIN.m3
                    total += float(torch.logsumexp(logits, 0) - logits[self.held[label]])
                else:
                    total += float(cos.sort(descending=True).values[:3].clamp_min(0).mean())
        return total / len(x)


def test_steps_equal_two_whole_layers_and_a_list():
    """With 6 slots for 15 people, classes leave, come back, and write their other layer."""
    random = torch.Generator().manual_seed(0)
    pool = pool_of(6)
    reference = Reference(pool)
    for _ in range(60):
        labels = torch.randint(0, 15, (4,), generator=random)
        centres = F.normalize(torch.randn(4, 4, generator=random))
        pool.write(centres, labels)
        reference.put(centres, labels)
        first, latest = reference.views()
        assert {label: slot.place for label, slot in pool.slots.items()} == reference.held
        assert list(pool.slots) == reference.used
        assert torch.allclose(pool.first_QD.double(), first)
        assert torch.allclose(pool.latest_QD.double(), latest)
        x, probe = torch.randn(5, 4, generator=random), torch.randint(0, 15, (5,), generator=random)
        assert float(pool(x, probe)) == pytest.approx(reference.loss(x, probe), abs=1e-5)


def test_rolling_back_leaves_no_trace():
    pool = pool_of(4)
    pool.write(F.normalize(torch.randn(3, 4)), torch.tensor([1, 2, 3]))
    before = {k: v.clone() for k, v in pool.state_dict().items()}
    pool.begin_step()
    pool.write(F.normalize(torch.randn(4, 4)), torch.tensor([3, 4, 5, 3]))
    assert list(pool.slots) == [2, 4, 5, 3]
    pool.roll_back()
    assert all(torch.equal(value, before[name]) for name, value in pool.state_dict().items())
    assert list(pool.slots) == [1, 2, 3]


def test_a_dropped_step_keeps_its_centres_and_no_number_that_is_not_finite():
    pool = pool_of(4)
    pool.begin_step()
    pool.write(torch.tensor([[0.0, 1.0, 0.0, 0.0], [math.nan, math.inf, -math.inf, 0.6]]), torch.tensor([1, 2]))
    pool.end_step(torch.tensor(False))
    assert list(pool.slots) == [1, 2]
    assert pool.first_QD[:2].tolist() == [[0, 1, 0, 0], [0, 0, 0, pytest.approx(0.6)]]


def test_the_gradient_is_the_faces_alone_and_survives_later_writes():
    pool = pool_of(4)
    pool.write(F.normalize(torch.randn(2, 4)), torch.tensor([1, 2]))
    x = torch.randn(3, 4, requires_grad=True)
    loss = pool(x, torch.tensor([1, 9, 2]))  # 9 is not in the pool
    pool.write(F.normalize(torch.randn(2, 4)), torch.tensor([3, 9]))
    loss.backward()
    assert (x.grad.abs().sum(1) > 0).sum() >= 2
    assert math.isfinite(float(loss.detach()))

import math
from collections import deque

import pytest
import torch
from torch.nn import functional as F

from fr_core.config.methods import DCQ, AttFC, Margin
from fr_core.errors import UserError
from fr_core.heads.attfc import generative_centres, update_encoder
from fr_core.heads.class_queue import NO_CLASS, ClassQueue
from fr_core.heads.streamed import Softmax

ARC = Margin(scale=64, m2=0.5, m3=0)


def test_a_step_by_hand():
    """Eq. 8–12 of AttFC by hand: B = K = D = 2, a queue of two slots, s = 2 and m = 0.2.

    Face 0 is (1, 0), its class images (2, 0) and (0, 1): cosines 1 and 0, so α = (e, 1)/(e + 1).
    Face 1 is (0, 3), its class images (0, 1) and (0, 3): cosines 1 and 1, so α = (1/2, 1/2).
    """
    x = torch.tensor([[1.0, 0.0], [0.0, 3.0]], requires_grad=True)
    class_images = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 3.0]]])
    centres = generative_centres(x, class_images, "attention")
    raw = torch.tensor([2 * math.e, 1.0]) / (math.e + 1)
    assert torch.allclose(centres, torch.stack([raw / raw.norm(), torch.tensor([0.0, 1.0])]))

    queue = ClassQueue(2, 2, Softmax(Margin(scale=2, m2=0.2, m3=0)), seed=0)
    queue.centres_SD.copy_(torch.tensor([[0.6, 0.8], [1.0, 0.0]]))
    queue.labels_S.copy_(torch.tensor([7, 5]))  # face 0 is person 7, face 1 is person 8
    loss = queue(x, centres, torch.tensor([7, 8]))
    angle = math.atan2(1.0, 2 * math.e)  # between face 0 and its centre
    first = math.log1p(math.exp(2 * 1.0) / math.exp(2 * math.cos(angle + 0.2)))  # slot 0 is its own class: left out
    second = math.log1p((math.exp(2 * 0.8) + math.exp(0)) / math.exp(2 * math.cos(0.2)))
    assert float(loss.detach()) == pytest.approx((first + second) / 2, rel=1e-6)

    queue.put(centres, torch.tensor([7, 8]), step=3)
    assert torch.allclose(queue.centres_SD, centres)
    assert queue.labels_S.tolist() == [7, 8]


@pytest.mark.parametrize("strategy", ["single", "constant", "attention"])
def test_strategies(strategy):
    random = torch.Generator().manual_seed(0)
    x, images = torch.randn(5, 8, generator=random), torch.randn(5, 3, 8, generator=random)
    cos = torch.stack([F.cosine_similarity(x, images[:, k]) for k in range(3)], 1)
    weights = {
        "single": torch.tensor([1.0, 0, 0]).expand(5, 3),
        "constant": torch.full((5, 3), 1 / 3),
        "attention": torch.exp(cos / 0.1) / torch.exp(cos / 0.1).sum(1, keepdim=True),
    }[strategy]
    mixed = sum(weights[:, k, None] * images[:, k] for k in range(3))
    found = generative_centres(x, images, strategy, temperature=0.1)
    assert torch.allclose(found, mixed / mixed.norm(dim=1, keepdim=True), atol=1e-6)


def test_no_gradient_reaches_centres_or_class_images():
    x, images = torch.randn(4, 8, requires_grad=True), torch.randn(4, 2, 8, requires_grad=True)
    centres = generative_centres(x, images, "attention")
    assert not centres.requires_grad
    queue = ClassQueue(8, 8, Softmax(ARC), seed=0)
    queue(x, centres, torch.arange(4)).backward()
    assert x.grad.abs().sum() > 0
    assert images.grad is None
    assert not any(buffer.requires_grad for buffer in queue.buffers())


class Reference:
    """AttFC's head in float64, as a deque of (centre, label) and dictionaries of logits."""

    def __init__(self, queue, order, margin):
        content = zip(queue.centres_SD.double(), queue.labels_S.tolist(), strict=True)
        self.queue, self.order, self.margin = deque(content, maxlen=len(queue.labels_S)), order, margin

    def step(self, x, class_images, labels):
        """Return the loss and its gradient by x."""
        x = x.double().requires_grad_()
        losses, made = [], []
        for f, images, label in zip(x, class_images.double(), labels.tolist(), strict=True):
            alpha = torch.softmax(torch.stack([torch.cosine_similarity(f, k, 0) for k in images]), 0).detach()
            centre = sum(a * k for a, k in zip(alpha, images, strict=True))
            made.append((centre / centre.norm(), label))
        if self.order == "paper":
            self.queue.extend(made)
        for f, (own, label) in zip(x, made, strict=True):
            unit = f / f.norm()
            theta = torch.acos(unit @ own)
            logits = {"own": self.margin.scale * torch.cos(theta + self.margin.m2)}
            for slot, (centre, other) in enumerate(self.queue):
                if other != label:
                    logits[slot] = self.margin.scale * (unit @ centre)
            losses.append(torch.logsumexp(torch.stack(list(logits.values())), 0) - logits["own"])
        if self.order == "reference":
            self.queue.extend(made)
        loss = torch.stack(losses).mean()
        loss.backward()
        return loss.detach(), x.grad


@pytest.mark.parametrize("order", ["paper", "reference"])
def test_fifty_steps_equal_a_deque(order):
    """With 12 slots and batches of 4 of 9 people, the queue wraps sixteen times, and many slots share a label."""
    random = torch.Generator().manual_seed(1)
    margin = Margin(scale=16, m2=0.3, m3=0)
    queue = ClassQueue(12, 6, Softmax(margin, tile=5), seed=3)
    assert (queue.labels_S == NO_CLASS).all()
    reference = Reference(queue, order, margin)
    for step in range(50):
        labels = torch.randint(0, 9, (4,), generator=random)
        images = torch.randn(4, 2, 6, generator=random)
        x = (images.mean(1) + 0.3 * torch.randn(4, 6, generator=random)).requires_grad_()
        centres = generative_centres(x, images, "attention")
        if order == "paper":
            queue.put(centres, labels, step)
        loss = queue(x, centres, labels)
        loss.backward()
        if order == "reference":
            queue.put(centres, labels, step)
        expected, gradient = reference.step(x.detach(), images, labels)
        assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-5)
        assert torch.allclose(x.grad.double(), gradient, atol=1e-5)
        first = (step + 1) * 4 % 12  # the oldest slot
        assert queue.labels_S.roll(-first).tolist() == [label for _, label in reference.queue]
        content = torch.stack([centre for centre, _ in reference.queue]).float()
        assert torch.allclose(queue.centres_SD.roll(-first, 0), content, atol=1e-6)


def test_a_dropped_steps_centres_are_taken_back():
    queue = ClassQueue(4, 3, Softmax(ARC), seed=0)
    first = queue.state_dict()["centres_SD"].clone()
    queue.begin_step()
    queue.put(torch.tensor([[1.0, 0, 0], [math.nan, 0, 0]]), torch.tensor([1, 2]), 1)
    assert queue.labels_S.tolist() == [NO_CLASS, NO_CLASS, 1, 2]
    queue.end_step(torch.tensor(False))
    assert torch.equal(queue.centres_SD, first)
    assert (queue.labels_S == NO_CLASS).all()
    queue.put(torch.eye(3)[:2], torch.tensor([3, 4]), 2)
    queue.begin_step()  # a step dropped before it puts anything in
    queue.end_step(torch.tensor(False))
    assert queue.labels_S.tolist() == [3, 4, NO_CLASS, NO_CLASS]


def test_momentum_moves_weights_and_leaves_statistics():
    q, k = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    q, k = torch.nn.Sequential(q, torch.nn.BatchNorm1d(2)), torch.nn.Sequential(k, torch.nn.BatchNorm1d(2))
    q[1].running_mean.fill_(5)
    expected = 0.9 * k[0].weight + 0.1 * q[0].weight
    update_encoder(k, q, 0.9)
    assert torch.allclose(k[0].weight, expected)
    assert not k[1].running_mean.any()


def test_slots_are_whole_batches():
    attfc = AttFC(size_ratio=0.3)
    assert attfc.centres(1_029_950, 384) == 308_736  # ⌊308,985 / 384⌋ · 384
    assert AttFC(size_ratio=0.05).centres(10_240, 128) == 512
    assert attfc.centres(205_990, 384) % 384 == 0
    assert DCQ(queue_size=1000).centres(205_990, 384) == 768
    with pytest.raises(UserError, match=r"a queue of 60 class centres cannot hold a batch of 128: raise .*size_ratio"):
        attfc.centres(200, 128)
    with pytest.raises(UserError, match=r"size_ratio = 1 gives only 100: lower train.global_batch to at most 30"):
        attfc.centres(100, 128)


def test_a_queue_in_bfloat16_is_half_as_large_and_nearly_equal():
    full, half = (ClassQueue(64, 16, Softmax(ARC, precision=p), seed=0) for p in (torch.float32, torch.bfloat16))
    assert half.centres_SD.nbytes == full.centres_SD.nbytes // 2
    x, labels = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    centres = F.normalize(x.roll(1, 0) + 0.5 * x)
    assert float(half(x, centres, labels)) == pytest.approx(float(full(x, centres, labels)), rel=0.02)

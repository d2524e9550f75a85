"""Classes of several rows, of which the nearest counts: against float64 over the whole matrix, on one rank and more."""

import math
from functools import cache

import pytest
import torch
from torch.nn import functional as F

from fr_core.config import Config
from fr_core.config.methods import BigFace, Margin
from fr_core.config.optim import SGD
from fr_core.heads.sharded_fc import ShardedFC, initial_rows
from fr_core.heads.streamed import Softmax, margin_softmax
from fr_core.optim.optimizers import head_optimizer
from fr_core.ranks import Ranks
from tests.helpers.ranks import run_ranks

N, K, D, G = 11, 3, 8, 8  # 11 classes divide by neither 2 nor 4
LABELS = [0, 10, 4, 4, 7, 5, 4, 10]
ARC = BigFace(margin=Margin(scale=16, m2=0.5, m3=0), subcentres=K)
METHODS = {
    "arcface": ARC,
    "filter": BigFace(margin=Margin(scale=16, m3=0.4), subcentres=K, drop_negatives_above=0.5),
    "tiles": ARC.model_copy(update={"tile": 2}),
    "four rows": ARC.model_copy(update={"subcentres": 4, "tile": 3}),
}
PARTIAL = BigFace(margin=Margin(scale=16, m3=0.4), subcentres=K, sample_rate=0.6)
ROWS = initial_rows(0, 4 * N, D, seed=1)


def embeddings():
    return torch.randn(G, D, generator=torch.Generator().manual_seed(0))


def dense_loss(method, x_GD, weight_ND, labels_G):
    """F.cross_entropy of the nearest rows, for autograd. No two rows of a class are equally near to a face."""
    cos = (F.normalize(x_GD) @ F.normalize(weight_ND).T).unflatten(1, (-1, method.subcentres)).max(2).values
    m, at = method.margin, torch.arange(len(x_GD))
    target = torch.cos(torch.acos(cos[at, labels_G]) + m.m2) - m.m3
    negative = torch.ones_like(cos, dtype=torch.bool).index_put((at, labels_G), torch.tensor(False))
    logits = cos.masked_fill(negative & (cos.detach() > method.drop_negatives_above), -torch.inf)
    return F.cross_entropy(m.scale * logits.index_put((at, labels_G), target), labels_G)


def reference(method, x_GD, weight_ND, labels_G):
    x, w = x_GD.double().requires_grad_(), weight_ND.double().requires_grad_()
    loss = dense_loss(method, x, w, labels_G)
    loss.backward()
    return loss.detach(), x.grad, w.grad


def own_of(ranks):
    return slice(ranks.rank * G // ranks.size, (ranks.rank + 1) * G // ranks.size)


def sharded(ranks, method, micro=1):
    """Loss and gradients of a global batch, in one or more micro-batches."""
    head = ShardedFC(N, D, method, ranks, seed=1)
    x_BD = embeddings()[own_of(ranks)].clone().requires_grad_()
    labels_B, total = torch.tensor(LABELS)[own_of(ranks)], 0.0
    for x, labels in zip(x_BD.chunk(micro), labels_B.chunk(micro), strict=True):
        loss = head(ranks.gather(x), ranks.gather(labels)) / micro
        loss.backward()
        total += float(loss.detach())
    return {"loss": total, "x": x_BD.grad, "weight": head.weight.grad}


def fused_steps(ranks):
    """Losses of three fused steps, the moved rows, and their momentum."""
    method = ARC.model_copy(update={"update": "fused", "tile": 2})
    head = ShardedFC(N, D, method, ranks, seed=1)
    optimizer = head_optimizer(Config(method=method), method, head)
    losses = []
    for step in range(3):
        x_GD = ranks.gather(embeddings()[own_of(ranks)].clone().requires_grad_())
        loss = head(x_GD, (torch.tensor(LABELS) + step) % N, sgd=optimizer.tile_sgd())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, head.weight.detach()


def partial_step(ranks, **update):
    """A step of Partial FC: sampled rows, loss, gradients, and the rows that a fused step moves."""
    method = PARTIAL.model_copy(update=update)
    head = ShardedFC(N, D, method, ranks, seed=1)
    optimizer = head_optimizer(Config(method=method), method, head)
    labels_G = torch.tensor(LABELS)
    rows_S = head.sample(labels_G, step=3)
    x_BD = embeddings()[own_of(ranks)].clone().requires_grad_()
    sgd = optimizer.tile_sgd() if method.update == "fused" else None
    loss = head(ranks.gather(x_BD), labels_G, rows_S, sgd)
    loss.backward()
    optimizer.step()
    return {"rows": rows_S + head.lo, "loss": float(loss.detach()), "x": x_BD.grad, "weight": head.weight.detach()}


def everything(ranks):
    found = {name: sharded(ranks, method) for name, method in METHODS.items()}
    found |= {"micro": sharded(ranks, ARC, micro=2), "fused": fused_steps(ranks)}
    return found | {"partial": partial_step(ranks), "partial, fused": partial_step(ranks, update="fused", tile=2)}


@pytest.fixture(scope="module")
def found_on():
    """A function that returns the results of each rank, by case, for a number of ranks."""
    return cache(lambda size: run_ranks(size, everything))


@pytest.mark.parametrize("case", [*METHODS, "micro"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_loss_and_gradients_equal_the_whole_matrix_in_float64(found_on, size, case):
    """Tolerances as in test_sharded_fc.py: rows of length .03 have gradients 35 times those of unit rows."""
    results = [found[case] for found in found_on(size)]
    method = METHODS.get(case, ARC)
    weight = ROWS[: N * method.subcentres]
    loss, x_grad, weight_grad = reference(method, embeddings(), weight, torch.tensor(LABELS))
    assert all(result["loss"] == pytest.approx(float(loss), abs=1e-5) for result in results)
    assert torch.allclose(torch.cat([r["x"] for r in results]).double(), x_grad, atol=1e-5)
    assert torch.allclose(torch.cat([r["weight"] for r in results]).double(), weight_grad, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_fused_steps_equal_sgd_on_the_whole_matrix(found_on, size):
    results = [found["fused"] for found in found_on(size)]
    weight = ROWS[: N * K].double().requires_grad_()
    optimizer = torch.optim.SGD([weight], **SGD().model_dump(include={"lr", "momentum", "weight_decay"}))
    for step in range(3):
        labels_G = (torch.tensor(LABELS) + step) % N
        loss, _, weight.grad = reference(ARC, embeddings(), weight.detach(), labels_G)
        assert all(losses[step] == pytest.approx(float(loss), abs=1e-5) for losses, _ in results)
        optimizer.step()
    assert torch.allclose(torch.cat([rows for _, rows in results]).double(), weight, atol=1e-5)


@pytest.mark.parametrize("case", ["partial", "partial, fused"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_partial_fc_samples_whole_classes(found_on, size, case):
    results = [found[case] for found in found_on(size)]
    rows = torch.cat([r["rows"] for r in results])
    classes = rows[::K] // K
    assert torch.equal(rows, (K * classes[:, None] + torch.arange(K)).flatten())
    assert set(LABELS) <= set(classes.tolist())
    assert len(classes) < N
    weight = ROWS[: N * K].double()
    labels_G = torch.searchsorted(classes, torch.tensor(LABELS))
    loss, x_grad, weight_grad = reference(PARTIAL, embeddings(), weight[rows], labels_G)
    assert all(r["loss"] == pytest.approx(float(loss), abs=1e-5) for r in results)
    assert torch.allclose(torch.cat([r["x"] for r in results]).double(), x_grad, atol=1e-5)
    weight[rows] -= 0.1 * (weight_grad + 5e-4 * weight[rows])
    assert torch.allclose(torch.cat([r["weight"] for r in results]).double(), weight, atol=2e-5)


def test_gradcheck():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, generator=random, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(10, 4, generator=random, dtype=torch.float64, requires_grad=True)
    softmax = Softmax(Margin(scale=4, m2=0.3, m3=0.1), tile=2, subcentres=2)

    def loss(x, w):
        return margin_softmax(F.normalize(x), w, torch.tensor([0, 4, 4]), softmax, Ranks())

    assert torch.autograd.gradcheck(loss, (x, weight))


def gradients(method, weight, x_GD=None, labels=LABELS):
    head = ShardedFC(N, D, method, Ranks(), seed=1)
    with torch.no_grad():
        head.weight.copy_(weight)
    loss = head(embeddings() if x_GD is None else x_GD, torch.tensor(labels))
    loss.backward()
    return loss.detach(), head.weight.grad


def test_of_equally_near_rows_the_first_one_moves():
    one = ROWS[:N]
    alone = gradients(ARC.model_copy(update={"subcentres": 1}), one)
    loss, gradient = gradients(ARC, one.repeat_interleave(K, 0))
    assert torch.allclose(loss, alone[0])
    assert torch.allclose(gradient[::K], alone[1], atol=2e-4, rtol=1e-4)
    assert not gradient.unflatten(0, (N, K))[:, 1:].any()


def test_a_face_moves_only_the_nearest_row_of_each_class():
    """One face: at most one row of a class has a gradient, and it is the one of the largest cosine."""
    x_GD = embeddings()[:1]
    _, gradient = gradients(ARC, ROWS[: N * K], x_GD, LABELS[:1])
    moved = gradient.any(1).unflatten(0, (N, K))
    nearest = (F.normalize(x_GD) @ F.normalize(ROWS[: N * K]).T).unflatten(1, (N, K)).argmax(2)[0]
    assert torch.equal(moved, F.one_hot(nearest, K).bool())


def test_halves_choose_the_own_row_in_float32():
    """Two rows of the class lie nearer to each other than bfloat16 tells: the face still moves the nearer one alone."""
    weight = torch.zeros(N * K, D)
    weight[:, -1] = torch.tensor([1.0, -1.0, 1.0] * N)  # across the face
    weight[:2, 0] = torch.tensor([2.0, 2.001])
    method = ARC.model_copy(update={"margin": Margin(scale=16, m3=0.4)})
    head = ShardedFC(N, D, method, Ranks(), seed=1, precision=torch.bfloat16)
    with torch.no_grad():
        head.weight.copy_(weight)
    head(torch.eye(1, D), torch.tensor([0])).backward()
    assert head.weight.grad.any(1)[:K].tolist() == [False, True, False]


def test_identical_faces_and_rows_at_both_ends_stay_finite():
    weight = torch.eye(N, D).repeat_interleave(K, 0)
    weight[0::K] *= -1
    loss, gradient = gradients(ARC, weight, torch.eye(N, D)[[0, 0, 1]], [0, 1, 1])
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_equal_cosines_give_the_logarithm_of_the_classes_not_of_the_rows():
    method = BigFace(margin=Margin(scale=10, m3=0), subcentres=K)
    loss, _ = gradients(method, torch.ones(N * K, D), torch.ones(2, D), [0, 8])
    assert float(loss) == pytest.approx(math.log(N), abs=1e-5)

import math
from functools import cache

import pytest
import torch
from torch.nn import functional as F

from fr_core.config import Config
from fr_core.config.methods import BigFace, Margin
from fr_core.config.optim import SGD
from fr_core.heads.sharded_fc import ShardedFC, initial_rows
from fr_core.optim.optimizers import head_optimizer
from fr_core.ranks import Ranks
from tests.helpers.ranks import run_ranks

N, D, G = 11, 8, 6  # 11 rows divide by neither 2 nor 3
ARC = BigFace(margin=Margin(scale=16, m2=0.5, m3=0))
METHODS = {
    "exact": ARC,
    "straight_through": ARC.model_copy(
        update={"margin": ARC.margin.model_copy(update={"gradient": "straight_through"})}
    ),
    "cosface": BigFace(margin=Margin(scale=16, m3=0.4)),
    "combined": BigFace(margin=Margin(scale=16, m1=1.1, m2=0.2, m3=0.1)),
    "filter": BigFace(margin=Margin(scale=16, m3=0.4), drop_negatives_above=0.3),
    "tiles": ARC.model_copy(update={"tile": 2}),
}
LABELS = {"mixed": [0, 10, 4, 4, 7, 5], "one rank's": [0, 1, 0, 2, 2, 1]}


def embeddings():
    return torch.randn(G, D, generator=torch.Generator().manual_seed(0))


def reference(method, x_GD, weight_ND, labels_G):
    """Return loss and gradients of F.cross_entropy over the whole matrix in float64, margins by acos and autograd."""
    x, w = x_GD.double().requires_grad_(), weight_ND.double().requires_grad_()
    cos = F.normalize(x) @ F.normalize(w).T
    m, rows = method.margin, torch.arange(G)
    theta = torch.acos(cos[rows, labels_G])
    target = torch.cos(m.m1 * theta + m.m2) - m.m3
    if m.gradient == "straight_through":
        target = target.detach() + theta.cos() - theta.cos().detach()
    negative = torch.ones_like(cos, dtype=torch.bool).index_put((rows, labels_G), torch.tensor(False))
    logits = cos.masked_fill(negative & (cos.detach() > method.drop_negatives_above), -torch.inf)
    loss = F.cross_entropy(m.scale * logits.index_put((rows, labels_G), target), labels_G)
    loss.backward()
    return loss.detach(), x.grad, w.grad


def sharded(ranks, method, labels):
    head = ShardedFC(N, D, method, ranks, seed=1)
    x_GD, labels_G = embeddings(), torch.tensor(labels)
    own = slice(ranks.rank * G // ranks.size, (ranks.rank + 1) * G // ranks.size)
    x_BD = x_GD[own].clone().requires_grad_()
    loss = head(ranks.gather(x_BD), ranks.gather(labels_G[own]))
    loss.backward()
    return {"loss": loss.detach(), "x": x_BD.grad, "weight": head.weight.grad, "rows": (head.lo, head.hi)}


def everything(ranks):
    """Return all results that the tests below compare, by case."""
    found = {(m, k): sharded(ranks, METHODS[m], LABELS[k]) for m in METHODS for k in LABELS}
    found |= {"fused": fused_steps(ranks), "fused, many": fused_steps(ranks, 1000), "partial": partial_step(ranks)}
    return found


@pytest.fixture(scope="module")
def found_on():
    """A function that returns the results of each rank, by case, for a number of ranks."""
    return cache(lambda size: run_ranks(size, everything))


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_loss_and_gradients_equal_the_whole_matrix_in_float64(found_on, size, method, labels):
    results = [found[method, labels] for found in found_on(size)]
    weight = initial_rows(0, N, D, seed=1)
    loss, x_grad, weight_grad = reference(METHODS[method], embeddings(), weight, torch.tensor(LABELS[labels]))
    for result in results:
        assert float(result["loss"]) == pytest.approx(float(loss), abs=1e-5)
    assert torch.allclose(torch.cat([r["x"] for r in results]).double(), x_grad, atol=1e-5)
    assert torch.allclose(torch.cat([r["weight"] for r in results]).double(), weight_grad, atol=2e-4, rtol=1e-4)
    assert [r["rows"][1] - r["rows"][0] for r in results] == [
        len(part) for part in torch.arange(N).tensor_split(len(results))
    ]


def fused_steps(ranks, identities=N):
    """Return the losses of three fused steps, the moved rows, and the bytes handed to collectives per step."""
    method = ARC.model_copy(update={"update": "fused", "tile": 2})
    head = ShardedFC(identities, D, method, ranks, seed=1)
    optimizer = head_optimizer(Config(method=method), method, head)
    own = slice(ranks.rank * G // ranks.size, (ranks.rank + 1) * G // ranks.size)
    losses = []
    for step in range(3):
        ranks.handed.clear()
        x_GD = ranks.gather(embeddings()[own].clone().requires_grad_())
        loss = head(x_GD, (torch.tensor(LABELS["mixed"]) + step) % N, sgd=optimizer.tile_sgd())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, head.weight.detach(), dict(ranks.handed)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_fused_steps_equal_sgd_on_the_whole_matrix(found_on, size):
    results = [found["fused"] for found in found_on(size)]
    weight = initial_rows(0, N, D, seed=1).double().requires_grad_()
    optimizer = torch.optim.SGD([weight], **SGD().model_dump(include={"lr", "momentum", "weight_decay"}))
    for step in range(3):
        loss, _, weight.grad = reference(ARC, embeddings(), weight.detach(), (torch.tensor(LABELS["mixed"]) + step) % N)
        assert all(losses[step] == pytest.approx(float(loss), abs=1e-5) for losses, _, _ in results)
        optimizer.step()
    assert torch.allclose(torch.cat([rows for _, rows, _ in results]).double(), weight, atol=1e-5)


def test_bytes_between_ranks_do_not_depend_on_the_identities(found_on):
    small, large = (found_on(2)[0][case][2] for case in ("fused", "fused, many"))
    faces, statistics = G // 2 * D * 4, 2 * G * 4
    assert small == large == {"all_gather": faces + statistics, "reduce_scatter": 2 * faces}


def test_initial_rows_do_not_depend_on_the_split():
    whole = initial_rows(0, 9000, 4, seed=5)
    assert torch.equal(torch.cat([initial_rows(0, 5000, 4, 5), initial_rows(5000, 9000, 4, 5)]), whole)
    assert abs(float(whole.std()) - 0.01) < 2e-4


def test_saturated_probabilities_and_parallel_vectors_stay_finite():
    head = ShardedFC(4, 3, BigFace(margin=Margin(scale=64, m2=0.5, m3=0)), Ranks(), 0)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, 0, 1]]))
    x = torch.tensor([[2.0, 0, 0], [2, 0, 0], [0, 1e-3, 0]], requires_grad=True)
    loss = head(x, torch.tensor([0, 1, 2]))
    loss.backward()
    assert loss.isfinite()
    assert loss > 64 * 1.5 / 3  # the second face is opposite its class: no clamp at 69
    assert x.grad.isfinite().all()
    assert head.weight.grad.isfinite().all()


def test_fewer_identities_than_ranks_is_refused():
    with pytest.raises(ValueError, match="2 identities"):
        ShardedFC(2, 4, ARC, Ranks(0, 3), 0)


PARTIAL = BigFace(margin=Margin(scale=16, m3=0.4), sample_rate=0.4)


def partial_step(ranks):
    """Take three steps of Partial FC; return moved rows, sampled rows, their old values, labels and loss of each."""
    head = ShardedFC(50, D, PARTIAL, ranks, seed=1)
    optimizer = head_optimizer(Config(method=PARTIAL), PARTIAL, head)
    history = []
    for step in range(3):
        labels_G = torch.tensor([0, 10, 44, 44, 7, 25]) + step
        rows = head.sample(labels_G, step)
        before = head.weight.detach().clone()
        loss = head(embeddings(), labels_G, rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        moved = (head.weight.detach() != before).any(1).nonzero().squeeze(1)
        history.append((moved + head.lo, rows + head.lo, before[rows], labels_G, float(loss)))
    return history


@pytest.mark.parametrize("size", [1, 2])
def test_partial_fc_moves_sampled_rows_only_and_holds_all_positives(found_on, size):
    ranks = [found["partial"] for found in found_on(size)]
    for parts in zip(*ranks, strict=True):
        rows = torch.cat([part[1] for part in parts])
        assert torch.equal(torch.cat([part[0] for part in parts]), rows)
        labels_G = parts[0][3]
        assert set(labels_G.tolist()) <= set(rows.tolist())
        assert all(len(part[1]) == int(0.4 * 50 / size) for part in parts)
        cos = F.normalize(embeddings().double()) @ F.normalize(torch.cat([part[2] for part in parts]).double()).T
        column = torch.searchsorted(rows, labels_G)
        cos[torch.arange(G), column] -= 0.4
        assert all(part[4] == pytest.approx(float(F.cross_entropy(16 * cos, column)), abs=1e-5) for part in parts)


def test_partial_fc_samples_anew_each_step_and_the_same_after_a_restart():
    head = ShardedFC(50, D, PARTIAL, Ranks(), seed=1)
    labels = torch.tensor([3, 4])
    assert torch.equal(head.sample(labels, 7), ShardedFC(50, D, PARTIAL, Ranks(), seed=1).sample(labels, 7))
    assert not torch.equal(head.sample(labels, 7), head.sample(labels, 8))
    many = torch.arange(30)
    assert torch.equal(head.sample(many, 0), many)  # more positives than the rate allows: all of them


def test_uniform_scores_give_the_logarithm_of_n():
    head = ShardedFC(9, 4, BigFace(margin=Margin(scale=10, m3=0)), Ranks(), 0)
    with torch.no_grad():
        head.weight.copy_(torch.ones(9, 4))
    assert float(head(torch.ones(2, 4), torch.tensor([0, 8]))) == pytest.approx(math.log(9), abs=1e-5)

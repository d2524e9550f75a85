import math

import numpy as np
import pytest
import torch

from fr_core.config.optim import Constant, Cosine, MultiStep, Polynomial
from fr_core.config.recipes import parse_config
from fr_core.heads.head import Head
from fr_core.optim.optimizers import LayerwiseSGD, OrthogonalSGD, RowSGD, make_optimizers, orthogonal, shares
from fr_core.optim.schedules import learning_rate
from fr_core.ranks import Ranks


def rates(schedule, total=100, per_epoch=10):
    return [0.2 * learning_rate(schedule, step, total, per_epoch) for step in range(total)]


def test_warm_up_reaches_the_base_rate_linearly():
    for schedule in (Constant(warmup_epochs=2), Cosine(warmup_epochs=2), Polynomial(warmup_epochs=2)):
        assert rates(schedule)[:20] == pytest.approx([0.2 * (i + 1) / 20 for i in range(20)])
        assert rates(schedule)[20] == pytest.approx(0.2)


def test_shapes_of_the_schedules():
    assert rates(Constant()) == [0.2] * 100
    cosine = rates(Cosine(final_ratio=0.1))
    assert cosine[50] == pytest.approx(0.2 * (0.1 + 0.9 / 2))
    assert cosine[99] == pytest.approx(0.2 * (0.1 + 0.9 * (1 + math.cos(0.99 * math.pi)) / 2))
    assert rates(Polynomial(power=2))[75] == pytest.approx(0.2 * 0.25**2)
    steps = rates(MultiStep(milestones=(2.5, 7), factor=0.1))
    assert steps[24:26] == pytest.approx([0.2, 0.02])
    assert steps[69:71] == pytest.approx([0.02, 0.002])


def test_row_sgd_equals_sgd_on_the_rows_it_touches():
    torch.manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(6, 3))
    sparse = torch.nn.Parameter(whole.detach().clone())
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    one, other = torch.optim.SGD([whole], **settings), RowSGD([sparse], **settings)
    rows = torch.tensor([1, 4])
    start = whole.detach().clone()
    for _ in range(4):
        grad = torch.randn(2, 3)
        whole.grad = torch.zeros(6, 3).index_copy(0, rows, grad)
        sparse.grad = torch.sparse_coo_tensor(rows[None], grad, (6, 3))
        one.step()
        other.step()
    assert torch.allclose(sparse[rows], whole[rows], atol=1e-6)
    others = torch.tensor([0, 2, 3, 5])
    assert torch.equal(sparse[others], start[others])
    assert not torch.equal(whole[others], start[others])  # a dense update would have moved them


def lars_by_hand(weight, grad, velocity, rate, momentum, decay, trust):
    """Algorithm 1 of LARS (You et al., 2017), for one tensor."""
    local = trust * np.linalg.norm(weight) / (np.linalg.norm(grad) + decay * np.linalg.norm(weight))
    velocity = momentum * velocity + rate * local * (grad + decay * weight)
    return weight - velocity, velocity


def test_lars_by_hand():
    """A matrix adapts and decays, a vector does neither, and a tensor of zeros has no length to adapt to."""
    random = np.random.default_rng(0)
    matrix, vector = random.normal(size=(4, 3)), random.normal(size=5)
    params = [torch.nn.Parameter(torch.tensor(array)) for array in (matrix, vector, np.zeros((2, 2)))]
    groups = [{"params": [params[0], params[2]]}, {"params": [params[1]], "weight_decay": 0.0, "adapt": False}]
    optimizer = LayerwiseSGD(groups, lr=0.5, momentum=0.9, weight_decay=0.01, trust=0.02)
    velocity, drift = np.zeros((4, 3)), np.zeros(5)
    for _ in range(5):
        grads = [random.normal(size=tuple(param.shape)) for param in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.tensor(grad)
        optimizer.step()
        matrix, velocity = lars_by_hand(matrix, grads[0], velocity, 0.5, 0.9, 0.01, 0.02)
        drift = 0.9 * drift + 0.5 * grads[1]
        vector = vector - drift
    assert np.allclose(params[0].detach(), matrix)
    assert np.allclose(params[1].detach(), vector)
    assert params[2].detach().isfinite().all()


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_orthogonal_keeps_the_directions_of_a_matrix(shape):
    """In the bases of the matrix's singular vectors, the result is near the identity."""
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    seen = left.mT @ orthogonal(matrices) @ right.mT
    lengths = seen.diagonal(dim1=1, dim2=2)
    assert (seen - torch.diag_embed(lengths)).abs().max() < 0.05  # bfloat16
    assert lengths.min() > 0.6
    assert lengths.max() < 1.3
    assert not orthogonal(torch.zeros(1, *shape)).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch's came with 2.9")
def test_muon_equals_pytorchs_on_matrices_and_sgd_on_the_rest():
    """PyTorch's Muon takes only matrices: a convolution is compared as the matrix of its filters."""
    torch.manual_seed(0)
    tensors = [torch.randn(8, 3, 3, 3), torch.randn(20, 6), torch.randn(5)]
    conv, wide, vector = (torch.nn.Parameter(t.clone()) for t in tensors)
    conv.data = conv.data.contiguous(memory_format=torch.channels_last)
    plain = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    groups = [{"params": [conv, wide]}, {"params": [vector], "adapt": False, **plain}]
    ours = OrthogonalSGD(groups, lr=0.05, momentum=0.95, weight_decay=0.1)
    twins = [torch.nn.Parameter(t.clone()) for t in (tensors[0].flatten(1), *tensors[1:])]
    muon = torch.optim.Muon(twins[:2], lr=0.05, momentum=0.95, weight_decay=0.1)
    sgd = torch.optim.SGD(twins[2:], **plain)
    for _ in range(5):
        for one, twin in zip((conv, wide, vector), twins, strict=True):
            one.grad = torch.randn_like(one)
            twin.grad = one.grad.reshape(twin.shape).clone()
        for optimizer in (ours, muon, sgd):
            optimizer.step()
    for one, twin, start in zip((conv, wide, vector), twins, tensors, strict=True):
        moved = (twin - start.reshape(twin.shape)).norm()
        assert (one.reshape(twin.shape) - twin).norm() < 0.03 * moved  # bfloat16


def rows_of(param):
    """Give a parameter a sparse gradient of some of its rows."""
    rows = torch.tensor([[0, 2]])
    param.grad = torch.sparse_coo_tensor(rows, param.grad[rows[0]], param.shape).coalesce()


@pytest.mark.parametrize(
    "made",
    [
        lambda params: RowSGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda params: LayerwiseSGD(params, lr=0.1, momentum=0.9, weight_decay=0.01, trust=0.02),
        lambda params: OrthogonalSGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    ],
    ids=["rows", "lars", "muon"],
)
def test_a_card_itself_drops_a_bad_step(made):
    """A card tells the optimiser by ``found_inf``. The steps between bad ones are those without any."""
    torch.manual_seed(0)
    first, trails = torch.randn(6, 4), {}
    for bad in ((), (0, 2)):
        random = torch.Generator().manual_seed(1)
        params = [torch.nn.Parameter(first.clone()), torch.nn.Parameter(first.clone() + 1)]
        optimizer = made(params)
        for step in range(4):
            grads = [torch.randn(6, 4, generator=random) for _ in params] if step not in (0, 2) else None
            if grads is None and not bad:
                continue
            for param, grad in zip(params, grads or [torch.full((6, 4), torch.nan)] * 2, strict=True):
                param.grad = grad
                if isinstance(optimizer, RowSGD):
                    rows_of(param)
            optimizer.found_inf = torch.tensor(float(grads is None)) if bad else None
            optimizer.step()
        state = [optimizer.state[param]["momentum_buffer"] for param in params]
        trails[bad] = [tensor.detach().clone() for tensor in (*params, *state)]
    assert all(torch.equal(a, b) for a, b in zip(*trails.values(), strict=True))


def test_parameters_are_dealt_out_in_near_equal_shares():
    params = [torch.empty(size) for size in (5, 1, 9, 4, 2, 8)]
    dealt = shares(params, 3)
    assert sorted(len(param) for share in dealt for param in share) == [1, 2, 4, 5, 8, 9]
    assert [sum(map(len, share)) for share in dealt] == [10, 10, 9]  # 9 + 1, 8 + 2, 5 + 4
    assert shares(params[:1], 2) == [[params[0]], []]


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)


class Rows(Head):
    sharded = ("weight",)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 2))


def groups_of(**optim):
    config = parse_config({"optim": optim, "train": {"global_batch": 256}}, "test")
    return {name: made.param_groups for name, made in make_optimizers(config, Net(), Rows(), Ranks()).items()}


def test_parameters_of_a_head_that_nothing_would_move_are_refused():
    """A method without a class matrix cannot have them, and ``sharded`` must name all of them."""
    pairs = parse_config({"method": {"kind": "quantface"}}, "test")
    with pytest.raises(ValueError, match=r"quantface: the parameters of a head .* class_matrix; .* head: weight"):
        make_optimizers(pairs, Net(), Rows(), Ranks())
    head = Rows()
    head.bias = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"named in its `sharded`.* head: bias, weight"):
        make_optimizers(parse_config({}, "test"), Net(), head, Ranks())


def test_groups_rates_and_decay():
    found = groups_of(lr=0.1, reference_batch=128, weight_decay=0.01)
    assert [group["initial_lr"] for group in found["backbone"]] == [0.2, 0.2]
    assert [group["weight_decay"] for group in found["backbone"]] == [0.01, 0.01]
    assert [p.ndim for group in found["backbone"] for p in group["params"]] == [4, 1, 1, 1]
    assert found["head"][0]["initial_lr"] == 0.2
    assert [g["weight_decay"] for g in groups_of(decay_all=False)["backbone"]] == [5e-4, 0]
    lars = groups_of(kind="lars", lr=3.0, head={"lr": 0.1, "momentum": 0.5, "weight_decay": 0.0})
    assert [(g["adapt"], g["weight_decay"]) for g in lars["backbone"]] == [(True, 5e-4), (False, 0)]
    assert [(g["lr"], g["momentum"], g["weight_decay"]) for g in lars["head"]] == [(0.1, 0.5, 0.0)]
    muon = groups_of(kind="muon", lr=0.04, reference_batch=128, sgd={"lr": 0.1, "weight_decay": 0.02})
    assert [(g["adapt"], g["lr"], g["weight_decay"], g["momentum"]) for g in muon["backbone"]] == [
        (True, 0.08, 0.01, 0.95),
        (False, 0.2, 0.02, 0.9),
    ]
    assert [(g["lr"], g["momentum"], g["weight_decay"]) for g in muon["head"]] == [(0.2, 0.9, 0.02)]
    adamw = groups_of(kind="adamw", beta2=0.98, head={"lr": 0.05})
    assert [(g["lr"], g["betas"], g["weight_decay"]) for g in adamw["backbone"]] == [
        (1e-3, (0.9, 0.98), 0.05),
        (1e-3, (0.9, 0.98), 0.0),
    ]
    assert [(g["lr"], g["momentum"], g["weight_decay"]) for g in adamw["head"]] == [(0.05, 0.9, 5e-4)]

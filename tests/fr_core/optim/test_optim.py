import math

import pytest
import torch

from fr_core.config import Constant, Cosine, MultiStep, Polynomial
from fr_core.optim.optimizers import RowSGD, squared_norm
from fr_core.optim.schedules import learning_rate


def rates(schedule, total=100, per_epoch=10):
    return [learning_rate(schedule, 0.2, step, total, per_epoch) for step in range(total)]


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
    assert not torch.equal(whole[others], start[others])  # what a dense update would have done


def test_squared_norm_of_dense_and_sparse_gradients():
    dense, sparse = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3, 2))
    dense.grad = torch.tensor([3.0, 4.0])
    sparse.grad = torch.sparse_coo_tensor([[1, 1]], [[1.0, 0.0], [1.0, 1.0]], (3, 2))  # a row named twice adds up
    assert float(squared_norm([dense, sparse], torch.device("cpu"))) == pytest.approx(25 + 4 + 1)
    assert float(squared_norm([torch.nn.Parameter(torch.zeros(1))], torch.device("cpu"))) == 0

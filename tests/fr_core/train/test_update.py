import pytest
import torch

from fr_core.train.update import clip, gradients, squared_norm

CPU = torch.device("cpu")


def test_the_norm_is_that_of_dense_and_sparse_gradients():
    dense, sparse, without = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((2,), (3, 2), (1,)))
    dense.grad = torch.tensor([3.0, 4.0])
    sparse.grad = torch.sparse_coo_tensor([[1, 1]], [[1.0, 0.0], [1.0, 1.0]], (3, 2))  # values of a repeated row add up
    grads = gradients([dense, sparse, without])
    assert len(grads) == 2
    assert float(squared_norm(grads, CPU)) == pytest.approx(25 + 4 + 1)
    assert float(squared_norm([], CPU)) == 0


def test_clipping_a_sparse_gradient_changes_the_gradient_itself():
    param = torch.nn.Parameter(torch.zeros(3, 2))
    param.grad = torch.sparse_coo_tensor([[2]], [[3.0, 4.0]], (3, 2))
    grads = gradients([param])
    clip(grads, squared_norm(grads, CPU).sqrt(), 0.5)
    assert param.grad.to_dense()[2].tolist() == pytest.approx([0.3, 0.4])


@pytest.mark.parametrize("limit", [None, 5.0, 6.0])
def test_gradients_within_the_limit_are_not_touched(limit):
    grads = [torch.tensor([3.0, 4.0])]
    clip(grads, torch.tensor(5.0), limit)
    assert grads[0].tolist() == [3, 4]

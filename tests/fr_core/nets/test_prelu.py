import pytest
import torch
from torch.nn import functional as F

from fr_core.nets.prelu import PReLU, prelu


def inputs(dtype, *shape):
    x = torch.randn(2, 3, *shape, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    return x, torch.tensor([0.5, -0.3, 2.0], dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)


def test_gradients_are_those_of_differences():
    assert torch.autograd.gradcheck(prelu, inputs(torch.float64, 4, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_pytorchs(dtype):
    x, slope = inputs(dtype, 64, 64)
    gradient = torch.randn_like(x)
    ours = torch.autograd.grad(prelu(x, slope), [x, slope], gradient)
    wide, theirs = x.detach().float().requires_grad_(), torch.nn.Parameter(slope.detach().clone())
    expected = torch.autograd.grad(F.prelu(wide, theirs), [wide, theirs], gradient.float())
    assert ours[0].dtype == dtype
    assert ours[1].dtype == torch.float32
    for ours_, expected_ in zip(ours, expected, strict=True):
        bound = 1e-5 if dtype == torch.float32 else 0.02  # sums of thousands of products with three digits
        assert (ours_.float() - expected_).norm() <= bound * expected_.norm()


def test_trains_in_autocasts_precision_and_computes_as_pytorchs():
    x, _ = inputs(torch.bfloat16, 8, 8)
    layer, theirs = PReLU(3), torch.nn.PReLU(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), theirs(x))
        assert torch.equal(layer.eval()(x), theirs(x))
        assert layer.train()(x).dtype == torch.bfloat16

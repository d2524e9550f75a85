"""A PReLU whose backward pass is fast on a CPU. Legend: B batch, C channels, H W pixels."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PReLU(nn.PReLU):
    """PyTorch's PReLU with another backward pass on a CPU: PyTorch's own takes a third of a net's training step."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return max(x, 0) + slope·min(x, 0)."""
        if self.training and x_BCHW.device.type == "cpu":
            return prelu(x_BCHW, self.weight)
        return super().forward(x_BCHW)


class _PReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, slope_C: Tensor) -> Tensor:
        ctx.save_for_backward(x_BCHW, slope_C)
        return F.prelu(x_BCHW, slope_C.to(x_BCHW.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x_BCHW, slope_C = ctx.saved_tensors
        above = torch.ops.aten.threshold_backward(gradient, x_BCHW, 0)
        below = gradient - above
        to_x = torch.addcmul(above, below, slope_C.to(x_BCHW.dtype)[:, None, None])
        return to_x, below.mul_(x_BCHW).sum((0, 2, 3)).to(slope_C.dtype)


def prelu(x_BCHW: Tensor, slope_C: Tensor) -> Tensor:
    """Return max(x, 0) + slope·min(x, 0) in x's precision; the backward pass uses vectorised operators."""
    return _PReLU.apply(x_BCHW, slope_C)

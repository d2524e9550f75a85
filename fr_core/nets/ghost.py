"""Ghost batch norm: batch statistics per group of a batch (Hoffer et al., "Train longer, generalize better", 2017).

Legend: B images, C channels, H W pixels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GhostBatchNorm(nn.Module):
    """Normalises each ``size`` neighbouring images of [B, C] or [B, C, H, W] by themselves.

    The same as the batch norm that it is made of, given the groups one after the other: parameters, their names and
    the running statistics are that one's. At inference nothing differs.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d, size: int) -> None:
        super().__init__()
        assert norm.momentum is not None  # a moving average
        self.size, self.eps, self.momentum = size, norm.eps, norm.momentum
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        groups, channels = len(x) // self.size, x.shape[1]
        # Groups become channels. The maps lie with their channels last, and so do these: [size, H, W, groups, C].
        x = x.movedim(1, -1).unflatten(0, (groups, self.size)).movedim(0, -2).flatten(-2).movedim(-1, 1)
        mean, variance = torch.zeros(2, groups * channels, device=x.device)
        weight, bias = self.weight.repeat(groups), self.bias.repeat(groups)
        x = F.batch_norm(x, mean, variance, weight, bias, training=True, momentum=1.0, eps=self.eps)
        for running_C, groups_C in ((self.running_mean, mean), (self.running_var, variance)):
            for batch_C in groups_C.split(channels):
                running_C.lerp_(batch_C, self.momentum)
        self.num_batches_tracked += groups
        return x.movedim(1, -1).unflatten(-1, (groups, channels)).movedim(-2, 0).flatten(0, 1).movedim(-1, 1)


def use_ghost_batches(net: nn.Module, size: int) -> None:
    """Makes every batch norm of a net one of groups of ``size`` images, in place."""
    for parent in list(net.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(parent, name, GhostBatchNorm(norm, size))

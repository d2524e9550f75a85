"""Ghost batch norm: batch statistics per group of a batch (Hoffer et al., "Train longer, generalize better", 2017).

Legend: B images, C channels, H W pixels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GhostBatchNorm(nn.Module):
    """Batch norm of [B, C] or [B, C, H, W] with separate statistics for each ``size`` neighbouring images.

    It computes what the original batch norm computes for the groups, one after the other. It takes over the
    original's parameters, their names and the running statistics. At inference both are the same.
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
        """Normalise a batch; its size must be a multiple of the group size in training."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        groups, channels = len(x) // self.size, x.shape[1]
        # Groups become channels. Memory stays channels-last: [size, H, W, groups, C].
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
    """Replace every batch norm of a net by ghost batch norm over ``size`` images, in place."""
    for parent in list(net.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(parent, name, GhostBatchNorm(norm, size))

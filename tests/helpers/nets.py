"""Nets whose weights and norms are random."""

import torch
from torch import nn

from fr_core.nets.build import build_net

NORMS = nn.BatchNorm1d | nn.BatchNorm2d


@torch.no_grad()
def random_net(config, dtype=torch.float32):
    """Random norms, gammas among them that are zero, tiny or negative; statistics near those of some noise."""
    torch.manual_seed(0)
    net = build_net(config).to(dtype)
    norms = [module for module in net.modules() if isinstance(module, NORMS)]
    for norm in norms:
        norm.momentum = 1.0
        norm.weight.normal_(1, 0.5)
        norm.weight[::5] = 0
        norm.weight[1::5] *= -1
        norm.weight[2::5] *= 1e-7
        norm.bias.normal_(0, 0.5)
    x = torch.randn(4, 3, config.input_size, config.input_size, dtype=dtype)
    net.features.float()  # as the forward pass wants it
    net.fc.float()
    net.train()(x)
    for norm in norms:
        norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= 0.8 + 0.4 * torch.rand_like(norm.running_var)
    return net.eval()

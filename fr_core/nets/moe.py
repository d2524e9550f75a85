"""A mixture of experts: E last stages on the trunk of an IR-ResNet, and a gate that chooses among them.

The BigFace report names such a net without defining it (docs/methods/bigface.md). Here the layer of Switch
Transformer (Fedus et al., 2022) replaces ``layer4``. A softmax gate picks the most probable expert, whose output is
multiplied by its probability, and a loss term balances the experts. With one ``active`` expert an image costs at
inference what it costs in the plain net. With all experts active the mixture is dense.

Legend: B batch, E experts, C channels, H W pixels.
"""

from functools import reduce

import torch
from torch import Tensor, nn

from fr_core.nets.iresnet import BlockForm, Stage, draw_convolutions, make_stage

GATE_STD = 0.01  # of the gate's initial weights: all experts start nearly equally probable


class Mixture(nn.Module):
    """Stages with one input, the experts; each image uses ``active`` of them.

    In training every expert sees every image. So its batch norm sees whole batches and shapes are fixed. Each expert
    also has a gradient on every rank, which is zero if no image chose the expert. At inference an expert sees only
    the images that chose it.

    Args:
        first: Last stage of the plain net, which becomes the first expert; the other experts are drawn.
        inputs, outputs: Channels before and after the stage.
        experts: E.
        active: Experts that each image uses.
        form: Form of the residual blocks.
    """

    def __init__(self, first: Stage, inputs: int, outputs: int, experts: int, active: int, form: BlockForm) -> None:
        super().__init__()
        self.active = active
        self.norm = nn.BatchNorm1d(inputs)  # the trunk's residual sums have no fixed scale
        self.gate = nn.Linear(inputs, experts)
        nn.init.normal_(self.gate.weight, 0, GATE_STD)
        nn.init.zeros_(self.gate.bias)
        others = (make_stage(inputs, outputs, len(first), form) for _ in range(experts - 1))
        self.experts = nn.ModuleList([first, *others])
        draw_convolutions(self.experts[1:])
        self.balance = torch.ones(())  # load-balance term of the last training batch, with its gradient

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the sum of the chosen experts' outputs, each times its probability."""
        with torch.autocast(x_BCHW.device.type, enabled=False):
            probability_BE = self.gate(self.norm(x_BCHW.float().mean((2, 3)))).softmax(1)
        chosen_BE = torch.zeros_like(probability_BE).scatter(1, probability_BE.topk(self.active, 1).indices, 1)
        weight_BE = probability_BE * chosen_BE
        if self.training:
            self.balance = load_balance(probability_BE, chosen_BE)
        if self.training or torch.compiler.is_exporting():  # a file's shapes cannot depend on the images
            weighted = (_weighted(weight_BE[:, e], expert(x_BCHW)) for e, expert in enumerate(self.experts))
            return reduce(torch.add, weighted)
        images = [chosen_B.nonzero()[:, 0] for chosen_B in chosen_BE.T]  # of each expert
        outputs = [_weighted(weight_BE[own, e], self.experts[e](x_BCHW[own])) for e, own in enumerate(images)]
        out = torch.cat(outputs)
        return out.new_zeros(len(x_BCHW), *out.shape[1:]).index_add(0, torch.cat(images), out)

    def from_plain(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn a plain net's weights into weights of the net with this mixture; return a mixture's weights unchanged.

        Every expert starts as the plain net's last stage, and the gate keeps its initial weights (Komatsuzaki et al.,
        "Sparse Upcycling", 2023). The statistics of the norm behind the mixture are scaled, since the probabilities
        of the active experts no longer sum to 1.
        """
        if any(name.startswith("layer4.experts.") for name in state):
            return state
        last = {name.removeprefix("layer4."): tensor for name, tensor in state.items() if name.startswith("layer4.")}
        experts = {f"experts.{e}.{name}": last[name] for e in range(len(self.experts)) for name in last}
        mixture = {f"layer4.{name}": tensor for name, tensor in (self.state_dict() | experts).items()}
        share = self.active / len(self.experts)
        for name, factor in (("bn2.running_mean", share), ("bn2.running_var", share**2)):
            mixture[name] = factor * state[name]
        return {name: tensor for name, tensor in state.items() if not name.startswith("layer4.")} | mixture


def take_balance(net: nn.Module) -> Tensor:
    """Return the load-balance term of a net's last training batch, and drop its graph from the net.

    Returns:
        A scalar with gradient.
    """
    mixture = next(module for module in net.modules() if isinstance(module, Mixture))
    balance, mixture.balance = mixture.balance, mixture.balance.detach()
    return balance


def load_balance(probability_BE: Tensor, chosen_BE: Tensor) -> Tensor:
    """Return E·Σ_e f_e·P_e, where f_e is the share of choices of expert e and P_e its mean probability.

    The term is 1 for balanced experts. It is equations 4 to 6 of Switch Transformer; the gradient flows through P
    alone.
    """
    share_E = chosen_BE.mean(0) / chosen_BE.sum(1).mean()
    return chosen_BE.shape[1] * (share_E * probability_BE.mean(0)).sum()


def _weighted(weight_B: Tensor, x_BCHW: Tensor) -> Tensor:
    """Multiply each image by its weight."""
    return weight_B[:, None, None, None] * x_BCHW

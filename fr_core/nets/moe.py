"""A mixture of experts: E last stages on the trunk of an IR-ResNet, and a gate that chooses among them (METHODS §5).

The report names such a net without defining it. Ours has Switch Transformer's layer (Fedus et al., 2022) in place of
``layer4``: a softmax gate, the most probable expert, its output times its probability, and a term that balances them.
With one ``active`` expert an image costs at inference what it costs in the plain net; with all of them active the
mixture is dense.

Legend: B batch, E experts, A active ones, C channels, H W pixels.
"""

from functools import reduce

import torch
from torch import Tensor, nn

from fr_core.nets.iresnet import Stage, draw_convolutions, make_stage

GATE_STD = 0.01  # nearly equal chances at first


class Mixture(nn.Module):
    """Stages that share an input, of which each image uses ``active``.

    In training every expert sees every image: its batch norm has whole batches to look at, shapes are fixed, and on
    every rank each expert has a gradient, of zero where no image chose it. At inference it sees its own images only.

    Args:
        first: the plain net's last stage, as the first expert; the others are drawn.
        inputs: C before, ``outputs`` after the stage.
    """

    def __init__(self, first: Stage, inputs: int, outputs: int, experts: int, active: int) -> None:
        super().__init__()
        self.active = active
        self.norm = nn.BatchNorm1d(inputs)  # the trunk's sums have no scale of their own
        self.gate = nn.Linear(inputs, experts)
        nn.init.normal_(self.gate.weight, 0, GATE_STD)
        nn.init.zeros_(self.gate.bias)
        self.experts = nn.ModuleList([first, *(make_stage(inputs, outputs, len(first)) for _ in range(experts - 1))])
        draw_convolutions(self.experts[1:])
        self.balance = torch.ones(())  # of the last batch in training, with its gradient

    def forward(self, x_BCHW: Tensor) -> Tensor:
        with torch.autocast(x_BCHW.device.type, enabled=False):
            probability_BE = self.gate(self.norm(x_BCHW.float().mean((2, 3)))).softmax(1)
        chosen_BE = torch.zeros_like(probability_BE).scatter(1, probability_BE.topk(self.active, 1).indices, 1)
        weight_BE = probability_BE * chosen_BE
        if self.training:
            self.balance = load_balance(probability_BE, chosen_BE)
        if self.training or torch.compiler.is_exporting():  # a file's shapes cannot depend on the images
            return reduce(torch.add, (by_image(weight_BE[:, e], f(x_BCHW)) for e, f in enumerate(self.experts)))
        rows = [chosen_B.nonzero()[:, 0] for chosen_B in chosen_BE.T]
        parts = [by_image(weight_BE[own, e], self.experts[e](x_BCHW[own])) for e, own in enumerate(rows)]
        out = torch.cat(parts)
        return out.new_zeros(len(x_BCHW), *out.shape[1:]).index_add(0, torch.cat(rows), out)

    def from_plain(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A plain net's weights as those of the net with this mixture; a mixture's own stay as they are.

        Every expert starts as the plain net's last stage, the gate as it is here (Komatsuzaki et al., "Sparse
        Upcycling", 2023). The norm behind it learns that the sum of the active experts' chances is no longer 1.
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
    """The load-balance term of a net's last batch in training: a scalar with gradient, which the net then forgets."""
    mixture = next(module for module in net.modules() if isinstance(module, Mixture))
    balance, mixture.balance = mixture.balance, mixture.balance.detach()
    return balance


def load_balance(probability_BE: Tensor, chosen_BE: Tensor) -> Tensor:
    """E·Σ_e f_e·P_e, with f_e the share of choices that fell on e and P_e its mean probability; 1 when balanced.

    Switch Transformer, equations 4 to 6; the gradient comes through P alone.
    """
    share_E = chosen_BE.mean(0) / chosen_BE.sum(1).mean()
    return chosen_BE.shape[1] * (share_E * probability_BE.mean(0)).sum()


def by_image(weight_B: Tensor, x_BCHW: Tensor) -> Tensor:
    return weight_B[:, None, None, None] * x_BCHW

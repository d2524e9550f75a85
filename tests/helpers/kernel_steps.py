"""A step of each softmax by kernels, also without a card: in Triton's interpreter.

Legend: G faces, D embedding, S rows that take part.
"""

from typing import NamedTuple

import torch

from fr_core.heads import kernels
from fr_core.heads.softmax_on_cards import FixedCentresSoftmax, MarginSoftmax
from fr_core.heads.streamed import Softmax
from fr_core.ranks import Ranks


class Step(NamedTuple):
    loss: torch.Tensor
    grad_GD: torch.Tensor
    grad_SD: torch.Tensor | None  # None: the rows moved
    skipped: float  # share of the blocks


class OtherRank(Ranks):
    """Two ranks, of which the other one holds no negative, and the positives of faces that have none here."""

    def __new__(cls, column_G, logit):
        ranks = super().__new__(cls)
        object.__setattr__(ranks, "theirs", torch.where(column_G < 0, logit, 0.0))
        return ranks

    def __init__(self, column_G, logit):
        super().__init__(0, 2)

    def gather(self, parts_2G):
        return torch.cat([parts_2G, torch.stack([torch.full_like(self.theirs, -torch.inf), self.theirs])])


def class_matrix_step(
    unit_GD,
    weight_ND,
    column_G,
    margin,
    precision,
    tile,
    drop_above=1.0,
    rows_S=None,
    eps=0.0,
    sgd=None,
    elsewhere=None,
):
    """The margin softmax; ``elsewhere``: logit of the positives that another rank holds."""
    x_GD, w_ND = unit_GD.clone().requires_grad_(), weight_ND.clone().requires_grad_() if sgd is None else weight_ND
    softmax = Softmax(margin, drop_above, precision, tile, eps)
    ranks = Ranks() if elsewhere is None else OtherRank(column_G, elsewhere)
    alive, real = [], kernels.list_alive
    kernels.list_alive = lambda alive_FC: alive.append(alive_FC) or real(alive_FC)
    try:
        loss = MarginSoftmax.apply(x_GD, w_ND, column_G, softmax, ranks, rows_S, sgd)
        loss.backward()
    finally:
        kernels.list_alive = real
    grad_SD = w_ND.grad
    if grad_SD is not None and grad_SD.is_sparse:
        assert torch.equal(grad_SD._indices()[0], rows_S)
        grad_SD = grad_SD._values()
    blocks = torch.cat([each.flatten() for each in alive])
    return Step(loss.detach(), x_GD.grad, grad_SD, 1 - float(blocks.double().mean()))


def fixed_centres_step(unit_GD, positive_GD, centres_SD, labels_G, labels_S, margin, precision, tile, drop_above=1.0):
    x_GD, softmax = unit_GD.clone().requires_grad_(), Softmax(margin, drop_above, precision, tile)
    loss = FixedCentresSoftmax.apply(x_GD, positive_GD, centres_SD, labels_G, labels_S, softmax)
    loss.backward()
    return Step(loss.detach(), x_GD.grad, None, 0.0)

"""A step of each head by the kernels, put together as ``fr_core.heads.streamed`` does.

Legend: G faces, D embedding, N rows, S rows that take part, T rows of a tile.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from fr_core.heads.margins import with_margin


class Step(NamedTuple):
    loss: torch.Tensor
    grad_GD: torch.Tensor
    grad_SD: torch.Tensor | None  # None: the rows moved
    skipped: float  # share of the blocks


def class_matrix_step(
    kernels,
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
    finite=None,
    elsewhere=0.0,
):
    """The margin softmax in two passes; ``elsewhere``: logit of the positives that another rank holds."""
    scale, rows = margin.scale, len(weight_ND if rows_S is None else rows_S)
    operand_GD = unit_GD.to(precision)

    def tiles():
        for start in range(0, rows, tile):
            yield start, kernels.unit_rows(weight_ND, rows_S, start, min(tile, rows - start), precision)

    parts = [kernels.log_sum_exp(operand_GD, each, column_G, scale, drop_above, start) for start, each in tiles()]
    negative_G = torch.cat(parts).logsumexp(0)
    row_G = column_G.clamp_min(0) if rows_S is None else rows_S[column_G.clamp_min(0)]
    positive_GD = F.normalize(weight_ND[row_G])
    value_G, slope_G = with_margin((unit_GD * positive_GD).sum(1), margin)
    positive_G = torch.where(column_G >= 0, scale * value_G, elsewhere)
    loss = F.softplus(negative_G - positive_G).mean()

    total_G = torch.logaddexp(negative_G, positive_G)
    pull_G = -torch.sigmoid(negative_G - positive_G) * slope_G
    positives = kernels.sort_positives(unit_GD, pull_G, column_G, rows)
    each = torch.ones_like(loss) * scale / len(unit_GD)
    sum_GD, grads, alive_blocks, blocks = torch.zeros_like(unit_GD), [], 0, 0
    for start, centres_TD in tiles():
        found = kernels.exponentials(operand_GD, centres_TD, column_G, total_G, scale, drop_above, start, eps=eps)
        alive = kernels.list_alive(found.alive_FC)
        kernels.add_products_of_faces(sum_GD, found, centres_TD, alive)
        product_TD = torch.empty_like(centres_TD, dtype=torch.float32)
        kernels.products_of_rows(found, operand_GD, alive, product_TD)
        here = weight_ND, rows_S, start, positives, each, precision
        if sgd:
            kernels.move_rows(product_TD, *here, sgd, finite)
        else:
            kernels.gradient_of_rows(product_TD, *here)
        grads.append(product_TD)
        alive_blocks, blocks = alive_blocks + found.alive_FC.sum(), blocks + found.alive_FC.numel()
    grad_GD = kernels.gradient_of_faces(sum_GD, precision, positive_GD, pull_G, column_G, each)
    return Step(loss, grad_GD, None if sgd else torch.cat(grads), 1 - alive_blocks / blocks)


def fixed_centres_step(
    kernels, unit_GD, positive_GD, centres_SD, labels_G, labels_S, margin, precision, tile, drop_above=1.0
):
    """The softmax against fixed centres, in one pass where there is a constant reference, else in two."""
    scale, operand_GD = margin.scale, unit_GD.to(precision)
    value_G, slope_G = with_margin((unit_GD * positive_GD).sum(1), margin)
    tiles = [(centres_TD.to(precision), labels_T) for centres_TD, labels_T in batched(centres_SD, labels_S, tile)]
    reference_G = kernels.one_pass_reference(unit_GD, scale, precision)
    if reference_G is None:
        parts = [
            kernels.log_sum_exp(operand_GD, centres_TD, labels_G, scale, drop_above, labels_T=labels_T)
            for centres_TD, labels_T in tiles
        ]
        reference_G = torch.cat(parts).logsumexp(0)
    pull_GD, sum_G = torch.zeros_like(unit_GD), 0
    for centres_TD, labels_T in tiles:
        found = kernels.exponentials(
            operand_GD, centres_TD, labels_G, reference_G, scale, drop_above, labels_T=labels_T
        )
        sum_G = sum_G + found.sums_CG.sum(0)
        pull_GD += found.values_GT.float() @ centres_TD.float()  # on a card: a product of PyTorch with float32 sums
    spread_G = reference_G + sum_G.log() - scale * value_G
    pull_GD /= kernels.gain(precision) * sum_G[:, None]
    grad_GD = torch.sigmoid(spread_G)[:, None] * (pull_GD - slope_G[:, None] * positive_GD) * scale / len(unit_GD)
    return Step(F.softplus(spread_G).mean(), grad_GD, None, 0.0)


def batched(centres_SD, labels_S, tile):
    return zip(centres_SD.split(tile), labels_S.split(tile), strict=True)

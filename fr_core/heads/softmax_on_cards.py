"""The softmaxes of ``fr_core/heads/streamed.py`` by Triton kernels, for tensors on a card (docs/methods/bigface.md).

They compute the same loss and the same gradients. But the logits stay on the chip, and the host asks the card nothing.

Legend: G faces of the global batch, D embedding, N rows of this rank, S rows that take part, T rows of one tile.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fr_core.heads import kernels
from fr_core.heads.margins import with_margin
from fr_core.heads.streamed import (
    Softmax,
    TileSGD,
    add_product,
    kernel_tile_size,
    over_ranks,
    own_slope_by_m2,
    rows_of,
    sparse_rows,
)
from fr_core.ranks import Ranks


class MarginSoftmax(torch.autograd.Function):
    """See :func:`fr_core.heads.streamed.margin_softmax`."""

    @staticmethod
    def forward(
        ctx: Any,
        unit_GD: Tensor,
        weight_ND: Tensor,
        column_G: Tensor,
        softmax: Softmax,
        ranks: Ranks,
        rows_S: Tensor | None,
        sgd: TileSGD | None,
        m2_G: Tensor | None,
    ) -> Tensor:
        """Return the loss: one pass over the tiles."""
        scale, operand_GD = softmax.margin.scale, unit_GD.to(softmax.precision)
        parts = [
            kernels.log_sum_exp(operand_GD, tile_TD, column_G, scale, softmax.drop_above, start, hard=softmax.hard)
            for start, tile_TD in _tiles(unit_GD, weight_ND, rows_S, softmax)
        ]
        positive_GD = F.normalize(weight_ND[rows_of(column_G, rows_S)])
        cos_G = (unit_GD * positive_GD).sum(1)
        value_G, slope_G = with_margin(cos_G, softmax.margin)
        own_G = torch.where(column_G >= 0, scale * value_G, 0)
        negative_G, positive_G = over_ranks(torch.cat(parts).logsumexp(0), own_G, ranks)
        loss = F.softplus(negative_G - positive_G).mean()
        by_m2_G = own_slope_by_m2(cos_G, m2_G, column_G, softmax)
        per_face = column_G, positive_GD, slope_G, negative_G, positive_G, by_m2_G
        ctx.save_for_backward(unit_GD, weight_ND, rows_S, loss.isfinite(), *per_face)
        ctx.softmax, ctx.sgd = softmax, sgd
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients: a second pass, which moves the rows in the fused mode."""
        unit_GD, weight_ND, rows_S, finite, *per_face = ctx.saved_tensors
        column_G, positive_GD, slope_G, negative_G, positive_G, by_m2_G = per_face
        softmax, sgd = ctx.softmax, ctx.sgd
        scale, precision, operand_GD = softmax.margin.scale, softmax.precision, unit_GD.to(softmax.precision)
        total_G = torch.logaddexp(negative_G, positive_G)
        away_G = -torch.sigmoid(negative_G - positive_G)  # p − 1 of the positive class
        pull_G = away_G * slope_G
        each = scale * grad / len(unit_GD)  # d loss / d cos = each · p
        grad_m2_G = None if by_m2_G is None else each * away_G * by_m2_G
        rows = len(weight_ND if rows_S is None else rows_S)
        positives = kernels.sort_positives(unit_GD, pull_G, column_G, rows)
        sum_GD, grad_SD = torch.zeros_like(unit_GD), None if sgd else weight_ND.new_empty(rows, weight_ND.shape[1])
        for start, tile_TD in _tiles(unit_GD, weight_ND, rows_S, softmax):
            given = scale, softmax.drop_above, start
            found = kernels.exponentials(
                operand_GD, tile_TD, column_G, total_G, *given, eps=softmax.skip_below, hard=softmax.hard
            )
            alive = kernels.list_alive(found.alive_FC)
            kernels.add_products_of_faces(sum_GD, found, tile_TD, alive)
            out_TD = (
                torch.empty_like(tile_TD, dtype=torch.float32) if grad_SD is None else grad_SD[start:][: len(tile_TD)]
            )
            kernels.products_of_rows(found, operand_GD, alive, out_TD)
            here = out_TD, weight_ND, rows_S, start, positives, each, precision
            if sgd:
                kernels.move_rows(*here, sgd, finite)
            else:
                kernels.gradient_of_rows(*here)
        grad_GD = kernels.gradient_of_faces(sum_GD, precision, positive_GD, pull_G, column_G, each)
        grad_GD = torch.where(finite, grad_GD, torch.nan)
        if grad_SD is not None and rows_S is not None:
            grad_SD = sparse_rows(rows_S, grad_SD, weight_ND)
        return grad_GD, grad_SD, *[None] * 5, grad_m2_G


class FixedCentresSoftmax(torch.autograd.Function):
    """See :func:`fr_core.heads.streamed.fixed_centres_softmax`."""

    @staticmethod
    def forward(
        ctx: Any,
        unit_GD: Tensor,
        positive_GD: Tensor,
        centres_SD: Tensor,
        labels_G: Tensor,
        labels_S: Tensor | None,
        softmax: Softmax,
    ) -> Tensor:
        """Return the loss and keep its gradient: one pass over the tiles, two if the scale or float16 needs it."""
        scale, precision = softmax.margin.scale, softmax.precision
        value_G, slope_G = with_margin((unit_GD * positive_GD).sum(1), softmax.margin)
        operand_GD, size = unit_GD.to(precision), softmax.tile or kernel_tile_size(*unit_GD.shape)
        reference_G = kernels.one_pass_reference(unit_GD, scale, precision)

        def tiles() -> Iterator[tuple[Tensor, dict[str, Any]]]:
            for start in range(0, len(centres_SD), size):
                here = slice(start, start + size)
                labels_T = None if labels_S is None else labels_S[here]
                yield centres_SD[here].to(precision), {"start": start, "labels_T": labels_T}

        if reference_G is None:
            parts = [
                kernels.log_sum_exp(operand_GD, tile_TD, labels_G, scale, softmax.drop_above, **place)
                for tile_TD, place in tiles()
            ]
            reference_G = torch.cat(parts).logsumexp(0)
        pull_GD, sums_CG = torch.zeros_like(unit_GD), []
        for tile_TD, place in tiles():
            found = kernels.exponentials(operand_GD, tile_TD, labels_G, reference_G, scale, softmax.drop_above, **place)
            sums_CG.append(found.sums_CG)
            add_product(pull_GD, 1, found.values_GT, tile_TD)
        sum_G = torch.cat(sums_CG).sum(0)
        spread_G = reference_G + sum_G.log() - scale * value_G
        pull_GD.div_(kernels.gain(precision) * sum_G.clamp_min(torch.finfo(torch.float32).tiny)[:, None])
        pull_GD.sub_(slope_G[:, None] * positive_GD).mul_(torch.sigmoid(spread_G)[:, None])
        ctx.save_for_backward(pull_GD.mul_(scale / len(unit_GD)))
        return F.softplus(spread_G).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the faces."""
        (grad_GD,) = ctx.saved_tensors
        return grad * grad_GD, *[None] * 5


def _tiles(unit_GD: Tensor, weight_ND: Tensor, rows_S: Tensor | None, softmax: Softmax) -> Iterator[tuple[int, Tensor]]:
    """Yield the start and the unit rows of each tile, in the type of the products."""
    rows, size = len(weight_ND if rows_S is None else rows_S), softmax.tile or kernel_tile_size(*unit_GD.shape)
    for start in range(0, rows, size):
        yield start, kernels.unit_rows(weight_ND, rows_S, start, min(size, rows - start), softmax.precision)

"""Softmax over many classes, one tile of classes at a time: exact loss, exact gradients (docs/methods/bigface.md).

The forward pass goes over the tiles once for the softmax's denominator. The backward pass goes over them again. It
recomputes the probabilities of a tile, and adds the tile's part to the gradient of the embeddings. Then it computes the
gradient of the tile's rows, through their normalisation.

Memory holds one tile of logits at a time, and no normalised copy of the class matrix. With :class:`TileSGD`, the rows
move while their tile is in cache, and the class matrix has no gradient at all.

The positive class is masked in its tile and handled separately. Subtracting it, Σ exp − exp(positive), would cancel.

A class may have K rows that neighbour each other. Then the row nearest to a face stands for the class, and the face
moves no other of its rows. Of equally near rows the first one counts (sub-centre ArcFace: Deng et al., ECCV 2020).

Legend: G faces of the global batch, D embedding, S rows of this rank that take part, T rows of one tile. C classes of a
tile, K rows of a class: T = C·K.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fr_core.config.methods import Margin
from fr_core.device import multiplies_bfloat16
from fr_core.heads.margins import FaceMargin, Hard, Threshold, slope_by_m2, with_margin
from fr_core.ranks import Ranks

MASKED = -1e30  # a logit of probability 0; finite, so that 0 · MASKED is 0
MIN_NORM = 1e-12  # smallest length of a row, as in F.normalize
HALF_GAIN = 2.0**10  # of probabilities in float16: they keep 11 bits down to 2⁻²⁴; a margin may steepen them 64 times
CPU_ROWS, CPU_LOGITS, GPU_LOGITS = 2**19, 2**18, 2**24  # numbers in a tile: they fit a CPU's cache, or fill a GPU
LEAST_CAPABILITY = (8, 0)  # of cards for Triton's kernels; on older ones they use no tensor cores and spill registers
KERNEL_LOGITS = 2**26  # exponentials in a tile of Triton's kernels
MIN_TILE = 256  # rows; matrix products of smaller tiles are slow
ONE_PASS = 4  # size factor of a CPU tile whose rows are read only once, so that it need not fit the cache

Gain = Tensor | float


@dataclass(frozen=True)
class Softmax:
    """The settings of a softmax and of its computation.

    Args:
        drop_above: negatives with a larger cosine get probability 0 (inter-class filter); 1 keeps all.
        precision: type of the operands of matrix products; everything else is float32.
        tile: classes per tile; None: as many as fit the cache or the GPU.
        skip_below: on a card, gradients of blocks are left out whose probabilities are all smaller
            (:func:`fr_core.heads.kernels.exponentials` states the error); 0 leaves out none.
        hard: the rule for hard negatives of a class matrix; None: all negatives have the logit s·cos.
        threshold: the loss of a class matrix is a sum at this threshold; None: a softmax. It runs by no kernels.
        subcentres: K, rows of a class of a class matrix. More than one run by no kernels.
    """

    margin: Margin | FaceMargin
    drop_above: float = 1.0
    precision: torch.dtype = torch.float32
    tile: int | None = None
    skip_below: float = 0.0
    hard: Hard | None = None
    threshold: Threshold | None = None
    subcentres: int = 1

    @property
    def m2_with_gradient(self) -> Tensor | None:
        """Return the margins of the faces' angles, if the loss has a gradient by them."""
        m2 = self.margin.m2
        return m2 if isinstance(m2, Tensor) and m2.requires_grad else None


@dataclass(frozen=True)
class TileSGD:
    """The settings of SGD with momentum and weight decay, which moves each tile of the class matrix in turn."""

    momentum_ND: Tensor
    lr: float
    momentum: float
    weight_decay: float


def margin_softmax(
    unit_GD: Tensor,
    weight_ND: Tensor,
    column_G: Tensor,
    softmax: Softmax,
    ranks: Ranks,
    rows_S: Tensor | None = None,
    sgd: TileSGD | None = None,
) -> Tensor:
    """Return the mean cross-entropy of the margin softmax over the rows of all ranks, or UniFace's loss over them.

    All ranks pass the same faces and get the same loss. ``unit_GD`` gets the part of its gradient that comes from this
    rank's rows; ``Ranks.gather`` sums the parts. The same holds for an m2 that requires a gradient. The rows get their
    whole gradient.

    Args:
        unit_GD: embeddings of length 1.
        weight_ND: rows of this rank, of any length; the function normalises them.
        column_G: int64, the place of each face's class among the classes that take part. It is negative if another rank
            holds the class.
        rows_S: sorted int64; only these rows take part (Partial FC), and their gradient is sparse. They are all rows of
            some classes.
        sgd: settings of the fused mode: the rows move in the backward pass and get no gradient. If the loss is not
            finite, nothing moves.
    """
    made: type[torch.autograd.Function] = _MarginSoftmax
    if runs_kernels(unit_GD) and softmax.threshold is None and softmax.subcentres == 1:
        from fr_core.heads.softmax_on_cards import MarginSoftmax as made
    return made.apply(unit_GD, weight_ND, column_G, softmax, ranks, rows_S, sgd, softmax.m2_with_gradient)


@torch.no_grad()
def own_cosines(
    unit_GD: Tensor,
    weight_ND: Tensor,
    column_G: Tensor,
    ranks: Ranks,
    rows_S: Tensor | None = None,
    subcentres: int = 1,
) -> Tensor:
    """Return the cosine of each face with its class [G], the same on all ranks, by one collective. It has no gradient.

    See :func:`margin_softmax` for the arguments.
    """
    cos_G, _ = nearest_own(unit_GD, weight_ND, column_G, rows_S, subcentres)
    return ranks.sum_(torch.where(column_G >= 0, cos_G, 0))


def fixed_centres_softmax(
    unit_GD: Tensor,
    positive_GD: Tensor,
    centres_SD: Tensor,
    labels_G: Tensor,
    labels_S: Tensor | None,
    softmax: Softmax,
) -> Tensor:
    """Return the mean cross-entropy of faces against fixed centres, in one pass over the centres.

    The centres carry no gradient. Σ p·w is accumulated together with the denominator, so that nothing is computed twice
    (docs/methods/attfc.md).

    Args:
        unit_GD: embeddings of length 1.
        positive_GD: unit centre of each face's class.
        centres_SD: unit centres, float32 or bfloat16.
        labels_G: int64, the label of each face.
        labels_S: int64, the label of each centre; a centre with a face's label is no negative of it. None: the labels
            are the places of the centres.
    """
    made: type[torch.autograd.Function] = _FixedCentresSoftmax
    if runs_kernels(unit_GD):
        from fr_core.heads.softmax_on_cards import FixedCentresSoftmax as made
    return made.apply(unit_GD, positive_GD, centres_SD, labels_G, labels_S, softmax)


def runs_kernels(unit_GD: Tensor) -> bool:
    """Tell whether a softmax of these faces runs by Triton's kernels: on a card with tensor cores that suit them."""
    return unit_GD.is_cuda and unit_GD.dtype == torch.float32 and _takes_kernels(unit_GD.device)


@cache
def _takes_kernels(device: torch.device) -> bool:
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def random_centres(count: int, embedding: int, precision: torch.dtype, seed: int) -> Tensor:
    """Return unit centres in random directions [count, D]. They are drawn in place: there may be millions.

    Centres of products in float16 are stored in float32: averages of many steps would lose digits.
    """
    centres_SD = torch.randn(count, embedding, generator=torch.Generator().manual_seed(seed))
    centres_SD /= torch.linalg.vector_norm(centres_SD, dim=1, keepdim=True)
    return centres_SD.to(torch.float32 if precision == torch.float16 else precision)


def same_label(labels_G: Tensor, labels_S: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the pairs of a face and a centre with the same label: int64 faces [P], columns [P], sorted by column.

    Without ``labels_S``, the label of a centre is its column.

    A binary search per centre finds the few centres with a label of the batch. Only these are compared with all faces.
    """
    sorted_G, face_G = labels_G.sort(stable=True)
    if labels_S is None:
        return face_G, sorted_G
    place_S = torch.searchsorted(sorted_G, labels_S).clamp_max_(len(sorted_G) - 1)
    column_C = (sorted_G[place_S] == labels_S).nonzero()[:, 0]
    centre_P, face_P = (labels_S[column_C][:, None] == labels_G).nonzero().unbind(1)
    return face_P, column_C[centre_P]


class _MarginSoftmax(torch.autograd.Function):
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
        scale = softmax.margin.scale
        cos_G, own_G = nearest_own(unit_GD, weight_ND, column_G, rows_S, softmax.subcentres)
        value_G, slope_G = with_margin(cos_G, softmax.margin)
        operand_GD = _operand(unit_GD, softmax.precision)
        threshold = softmax.threshold
        sums: _SoftplusSum | _LogSumExp = _LogSumExp(unit_GD, scale)
        if threshold:
            sums = _SoftplusSum(unit_GD, threshold.bias)
        inverses = []
        size = softmax.tile or tile_size(len(unit_GD), unit_GD.shape[1], unit_GD.device, softmax.subcentres)
        classes = len(weight_ND if rows_S is None else rows_S) // softmax.subcentres
        positives = _Positives(*column_G.sort(), classes, size)
        for tile in _tiles(weight_ND, rows_S, positives, softmax):
            sums.add(tile.negatives(operand_GD))
            inverses.append(tile.inverse_T)
        logit_G = torch.where(column_G >= 0, scale * value_G, 0)
        if isinstance(sums, _SoftplusSum):
            assert threshold
            loss, total_G, away_G = sums.loss(logit_G, threshold, ranks)
        else:
            negative_G, positive_G = over_ranks(sums.value_G(), logit_G, ranks)
            loss = F.softplus(negative_G - positive_G).mean()
            total_G, away_G = torch.logaddexp(negative_G, positive_G), -torch.sigmoid(negative_G - positive_G)
        per_face = (cos_G, own_G, slope_G, total_G, away_G, own_slope_by_m2(cos_G, m2_G, column_G, softmax))
        ctx.save_for_backward(unit_GD, weight_ND, rows_S, torch.cat(inverses), *per_face)
        ctx.softmax, ctx.positives = softmax, positives
        ctx.sgd, ctx.finite = sgd, sgd is None or bool(loss.isfinite())
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit_GD, weight_ND, rows_S, inverse_S, cos_G, own_G, slope_G, total_G, away_G, by_m2_G = ctx.saved_tensors
        softmax, sgd = ctx.softmax, ctx.sgd
        grad_GD = torch.zeros_like(unit_GD)
        if not ctx.finite:
            return grad_GD.fill_(math.nan), *[None] * 7
        pull_G = away_G * slope_G  # p − 1 of the positive class, times the margin's slope
        operand_GD = _operand(unit_GD, softmax.precision)
        each = softmax.margin.scale * grad / len(unit_GD)  # d loss / d cos = each · p
        grad_m2_G = None if by_m2_G is None else each * away_G * by_m2_G
        grad_SD = None if sgd else torch.empty_like(weight_ND if rows_S is None else weight_ND[: len(rows_S)])
        for tile in _tiles(weight_ND, rows_S, ctx.positives, softmax, inverse_S):
            gain = tile.gain(each)
            push_GT, radial_T = tile.push(operand_GD, total_G, pull_G, cos_G, own_G, each * gain)
            add_product(grad_GD, 1, push_GT, tile.operand_TD, gain)
            if grad_SD is None:
                tile.move(push_GT, operand_GD, radial_T, gain, sgd, weight_ND)
            else:
                tile.gradient(push_GT, operand_GD, radial_T, gain, grad_SD)
        if grad_SD is not None and rows_S is not None:
            grad_SD = sparse_rows(rows_S, grad_SD, weight_ND)
        return grad_GD, grad_SD, *[None] * 5, grad_m2_G


class _FixedCentresSoftmax(torch.autograd.Function):
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
        scale, own = softmax.margin.scale, tile_size(len(unit_GD), unit_GD.shape[1], unit_GD.device)
        size = softmax.tile or (own if unit_GD.is_cuda else ONE_PASS * own)
        value_G, slope_G = with_margin((unit_GD * positive_GD).sum(1), softmax.margin)
        operand_GD = _operand(unit_GD, softmax.precision)
        sums, pull_GD = _LogSumExp(unit_GD, scale), torch.zeros_like(unit_GD)
        face_P, column_P = same_label(labels_G, labels_S)
        for start, places in _Positives(column_P, face_P, len(centres_SD), size):
            operand_TD = _operand(centres_SD[start : start + size], softmax.precision)
            logits_GT = _product(operand_GD, operand_TD.T).mul_(scale)
            _drop(logits_GT, softmax)
            if places:
                _mask(logits_GT, places)
            shrink_G = sums.add(logits_GT)
            pull_GD.mul_(shrink_G[:, None])
            gain = 1.0
            if softmax.precision == torch.float16:
                gain = HALF_GAIN
                logits_GT.mul_(gain)
            add_product(pull_GD, 1, _operand(logits_GT, softmax.precision), operand_TD, gain)
        spread_G = sums.value_G() - scale * value_G
        total_G = sums.sum_G.clamp_min(torch.finfo(unit_GD.dtype).tiny)
        pull_GD.div_(total_G[:, None])  # the mean of the negatives, weighted by p
        pull_GD.sub_(slope_G[:, None] * positive_GD).mul_(torch.sigmoid(spread_G)[:, None])
        ctx.save_for_backward(pull_GD.mul_(scale / len(unit_GD)))
        return F.softplus(spread_G).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad_GD,) = ctx.saved_tensors
        return grad * grad_GD, *[None] * 5


class _Positives:
    """The places of positives in each tile, found once: faces and columns, sorted by column."""

    def __init__(self, column_P: Tensor, face_P: Tensor, rows: int, size: int) -> None:
        self.column_P, self.face_P, self.size = column_P, face_P, size
        self.starts = range(0, rows, size)
        edges = torch.arange(len(self.starts) + 1, device=column_P.device) * size
        self.edges = torch.searchsorted(column_P, edges).tolist()

    def __iter__(self) -> Iterator[tuple[int, tuple[Tensor, Tensor] | None]]:
        """Yield the start of each tile, and the faces and columns of its positives; None if it has none."""
        for start, (first, last) in zip(self.starts, pairwise(self.edges), strict=True):
            here = slice(first, last)
            yield start, (self.face_P[here], self.column_P[here] - start) if first < last else None


@dataclass(frozen=True)
class _Tile:
    """Rows [start, start + T) of the rows that take part; ``rows`` are their places in the class matrix."""

    start: int
    rows: slice | Tensor
    weight_TD: Tensor
    operand_TD: Tensor
    inverse_T: Tensor  # 1 / length
    positives: tuple[Tensor, Tensor] | None  # faces whose class is in this tile, and its columns among the classes
    softmax: Softmax

    def negatives(self, operand_GD: Tensor) -> Tensor:
        """Return the logits [G, C], with the positives masked."""
        logits_GC, _ = self.cosines(operand_GD)
        return bend(logits_GC, self.softmax.margin.scale, self.softmax.hard)[0] if self.softmax.hard else logits_GC

    def cosines(self, operand_GD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return scale · cosine of the nearest rows [G, C], with the positives masked, and which of K rows they are."""
        logits_GT = _product(operand_GD, self.operand_TD.T).mul_(self.softmax.margin.scale * self.inverse_T)
        logits_GC, nearest_GC = logits_GT, None
        if self.softmax.subcentres > 1:
            logits_GC, nearest_GC = logits_GT.unflatten(1, (-1, self.softmax.subcentres)).max(2)
        _drop(logits_GC, self.softmax)
        if self.positives:
            _mask(logits_GC, self.positives)
        return logits_GC, nearest_GC

    def gain(self, each: Tensor) -> Gain:
        """Return the factor of the push, without which float16 would round small probabilities to 0."""
        return HALF_GAIN / (each * self.inverse_T.amax()) if self.softmax.precision == torch.float16 else 1.0

    def push(
        self, operand_GD: Tensor, total_G: Tensor, pull_G: Tensor, cos_G: Tensor, own_G: Tensor, each: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient by the products of unit faces and raw rows [G, T], and its part along each row [T]."""
        scale = self.softmax.margin.scale
        logits_GC, nearest_GC = self.cosines(operand_GD)
        if self.softmax.hard:
            bent_GC, slope_GC = bend(logits_GC, scale, self.softmax.hard)
            push_GC = bent_GC.sub_(total_G[:, None]).exp_().mul_(slope_GC)
        elif self.softmax.threshold:
            push_GC = (logits_GC - total_G[:, None]).sigmoid_().mul_(self.softmax.threshold.balance)
        else:
            push_GC = (logits_GC - total_G[:, None]).exp_()
        push_GT, logits_GT = (_at_nearest(x_GC, nearest_GC, self.softmax.subcentres) for x_GC in (push_GC, logits_GC))
        if self.positives:
            faces, _ = self.positives
            own = faces, own_G[faces] - self.start
            push_GT[own], logits_GT[own] = pull_G[faces], scale * cos_G[faces]
        push_GT.mul_(each * self.inverse_T)
        radial_T = logits_GT.mul_(push_GT).sum(0).mul_(self.inverse_T / scale)
        return _operand(push_GT, self.softmax.precision), radial_T

    def gradient(self, push_GT: Tensor, operand_GD: Tensor, radial_T: Tensor, gain: Gain, out_SD: Tensor) -> None:
        """Write the gradient of the rows to their place in ``out_SD``."""
        out_TD = out_SD[self.start : self.start + len(self.weight_TD)]
        add_product(out_TD, 0, push_GT.T, operand_GD, gain)
        out_TD.addcmul_(self.weight_TD, radial_T[:, None] / gain, value=-1)

    def move(
        self, push_GT: Tensor, operand_GD: Tensor, radial_T: Tensor, gain: Gain, sgd: TileSGD, weight_ND: Tensor
    ) -> None:
        """Move the rows by SGD, in place: m ← μ·m + gradient + λ·w, w ← w − lr·m."""
        momentum_TD = sgd.momentum_ND[self.rows]
        add_product(momentum_TD, sgd.momentum, push_GT.T, operand_GD, gain)
        momentum_TD.addcmul_(self.weight_TD, (sgd.weight_decay - radial_T / gain)[:, None])
        self.weight_TD.add_(momentum_TD, alpha=-sgd.lr)
        if isinstance(self.rows, Tensor):  # indexing made copies: write them back
            sgd.momentum_ND[self.rows] = momentum_TD
            weight_ND[self.rows] = self.weight_TD


class _LogSumExp:
    """A running log Σ exp over tiles."""

    def __init__(self, unit_GD: Tensor, scale: float) -> None:
        self.top_G = unit_GD.new_full((len(unit_GD),), -2 * scale)  # below every logit
        self.sum_G = torch.zeros_like(self.top_G)

    def add(self, logits_GT: Tensor) -> Tensor:
        """Add a tile: its logits become exp(logit − top) in place. Return the factor by which older sums shrink [G]."""
        top_G = torch.maximum(self.top_G, logits_GT.amax(1))
        shrink_G = torch.exp(self.top_G - top_G)
        self.sum_G = self.sum_G * shrink_G + logits_GT.sub_(top_G[:, None]).exp_().sum(1)
        self.top_G = top_G
        return shrink_G

    def value_G(self) -> Tensor:
        """Return log Σ exp over the tiles so far [G]."""
        return self.top_G + self.sum_G.log()


class _SoftplusSum:
    """Running Σ softplus(logit − b) and Σ sigmoid(logit − b) over tiles."""

    def __init__(self, unit_GD: Tensor, bias: Tensor) -> None:
        self.bias = bias.to(unit_GD)
        self.sums_2G = unit_GD.new_zeros(2, len(unit_GD))

    def add(self, logits_GT: Tensor) -> None:
        """Add a tile, whose logits are overwritten."""
        logits_GT.sub_(self.bias)
        self.sums_2G[0] += F.softplus(logits_GT).sum(1)
        self.sums_2G[1] += logits_GT.sigmoid_().sum(1)

    def loss(self, own_G: Tensor, threshold: Threshold, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean loss, what to subtract from logits [G], and the positive's derivative by its logit [G].

        It writes the derivative by b. One collective adds up three numbers of each face.

        Args:
            own_G: logit of the positive class, and 0 if another rank holds the class.
        """
        parts_W3G = ranks.gather(torch.cat([self.sums_2G, own_G[None]])).unflatten(0, (ranks.size, 3))
        softplus_G, sigmoid_G, positive_G = parts_W3G.sum(0)
        away_G = -torch.sigmoid(self.bias - positive_G)
        threshold.gradient.copy_((-away_G - threshold.balance * sigmoid_G).mean())
        loss = (F.softplus(self.bias - positive_G) + threshold.balance * softplus_G).mean()
        return loss, self.bias.expand_as(positive_G), away_G


def tile_size(faces: int, embedding: int, device: torch.device, subcentres: int = 1) -> int:
    """Return the classes per tile, for a softmax that does not set them."""
    rows = GPU_LOGITS // faces if device.type == "cuda" else min(CPU_ROWS // embedding, CPU_LOGITS // faces)
    return max(1, max(MIN_TILE, rows) // subcentres)


def kernel_tile_size(faces: int, embedding: int) -> int:
    """Return the classes per tile of Triton's kernels, a multiple of the classes of a block.

    A tile's exponentials take 128 MiB in 2 bytes each, and work for half a millisecond on a large card.
    """
    return max(MIN_TILE, KERNEL_LOGITS // max(faces, embedding) // MIN_TILE * MIN_TILE)


def _tiles(
    weight_ND: Tensor, rows_S: Tensor | None, positives: _Positives, softmax: Softmax, inverse_S: Tensor | None = None
) -> Iterator[_Tile]:
    """Yield the rows that take part, tile by tile; ``inverse_S``: their inverse lengths, if already known."""
    for first, places in positives:
        start, end = (softmax.subcentres * place for place in (first, first + positives.size))
        rows = slice(start, end) if rows_S is None else rows_S[start:end]
        weight_TD = weight_ND[rows]
        if inverse_S is None:
            inverse_T = torch.linalg.vector_norm(weight_TD, dim=1).clamp_min_(MIN_NORM).reciprocal_()
        else:
            inverse_T = inverse_S[start:end]
        yield _Tile(start, rows, weight_TD, _operand(weight_TD, softmax.precision), inverse_T, places, softmax)


def over_ranks(negative_G: Tensor, positive_G: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return log Σ exp over the negatives of all ranks, and the logit of the positive class, with one collective.

    Args:
        negative_G: log Σ exp over the negatives of this rank.
        positive_G: logit of the positive class, and 0 if another rank holds the class.
    """
    parts_W2G = ranks.gather(torch.stack([negative_G, positive_G])).unflatten(0, (ranks.size, 2))
    return parts_W2G[:, 0].logsumexp(0), parts_W2G[:, 1].sum(0)


def rows_of(column_G: Tensor, rows_S: Tensor | None) -> Tensor:
    """Return the row of each face's class; some row, if another rank holds the class."""
    return column_G.clamp_min(0) if rows_S is None else rows_S[column_G.clamp_min(0)]


def nearest_own(
    unit_GD: Tensor, weight_ND: Tensor, column_G: Tensor, rows_S: Tensor | None, subcentres: int
) -> tuple[Tensor, Tensor]:
    """Return the cosine of each face and the nearest row of its class, and this row's place among those that take part.

    If another rank holds the class, the place is negative, and the cosine means nothing.
    """
    place_GK = subcentres * column_G[:, None] + torch.arange(subcentres, device=column_G.device)
    cos_GK = (unit_GD[:, None] * F.normalize(weight_ND[rows_of(place_GK, rows_S)], dim=2)).sum(2)
    cos_G, nearest_G = cos_GK.max(1)
    return cos_G, subcentres * column_G + nearest_G


def _at_nearest(x_GC: Tensor, nearest_GC: Tensor | None, subcentres: int) -> Tensor:
    """Return each class's number at the nearest of its rows, and 0 at the others [G, T]."""
    if nearest_GC is None:
        return x_GC
    zeros_GCK = x_GC.new_zeros(*x_GC.shape, subcentres)
    return zeros_GCK.scatter_(2, nearest_GC[:, :, None], x_GC[:, :, None]).flatten(1)


def own_slope_by_m2(cos_G: Tensor, m2_G: Tensor | None, column_G: Tensor, softmax: Softmax) -> Tensor | None:
    """Return the derivative of the positive cosine by m2, 0 for classes of other ranks; None if m2 has no gradient."""
    if m2_G is None:
        return None
    assert isinstance(softmax.margin, FaceMargin)
    return torch.where(column_G >= 0, slope_by_m2(cos_G, softmax.margin), 0)


def sparse_rows(rows_S: Tensor, grad_SD: Tensor, weight_ND: Tensor) -> Tensor:
    """Return the gradient of the class matrix, which has the given rows only."""
    return torch.sparse_coo_tensor(rows_S[None], grad_SD, weight_ND.shape, is_coalesced=True, check_invariants=False)


def bend(logits_GC: Tensor, scale: float, hard: Hard) -> tuple[Tensor, Tensor]:
    """Return the logits of a tile with those of hard negatives, s·cos·(t + cos), and their derivative by s·cos.

    Args:
        logits_GC: scale · cosine; a masked logit stays what it is.
    """
    cos_GC = logits_GC / scale
    is_hard_GC = cos_GC > hard.above_G[:, None]
    bent_GC = torch.where(is_hard_GC, (cos_GC + hard.t).mul_(logits_GC), logits_GC)
    return bent_GC, torch.where(is_hard_GC, cos_GC.mul_(2).add_(hard.t), 1.0)


def _mask(logits_GT: Tensor, places: tuple[Tensor, Tensor]) -> None:
    """Mask logits at some faces and columns. A number would be copied to a GPU, which waits for it."""
    logits_GT[places] = logits_GT.new_full((), MASKED)


def _drop(logits_GT: Tensor, softmax: Softmax) -> None:
    if softmax.drop_above < 1:
        logits_GT.masked_fill_(logits_GT > softmax.margin.scale * softmax.drop_above, MASKED)


def _operand(x: Tensor, precision: torch.dtype) -> Tensor:
    """Round an operand of a product. A processor without such products multiplies the rounded numbers in float32."""
    if precision not in (torch.bfloat16, torch.float16):
        return x
    native = x.is_cuda if precision == torch.float16 else multiplies_bfloat16(x.device)
    return x.to(precision) if native else x.to(precision).to(torch.promote_types(x.dtype, torch.float32))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices with float32 sums. The result is float32; on a CPU it passes through bfloat16."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


def add_product(out: Tensor, keep: float, a: Tensor, b: Tensor, gain: Gain = 1.0) -> None:
    """Compute out ← keep·out + a·b / gain in place."""
    plain = isinstance(gain, float) and gain == 1
    if plain and a.dtype == out.dtype:
        out.addmm_(a, b, beta=keep)
        return
    product = _product(a, b) if plain else _product(a, b) / gain
    if keep:
        out.mul_(keep).add_(product)
    else:
        out.copy_(product)

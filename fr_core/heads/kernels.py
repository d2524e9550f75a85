"""The streamed softmax of a tile as Triton kernels for cards: its logits never reach memory (docs/methods/bigface.md).

:mod:`fr_core.heads.streamed` is the reference. One program computes the cosines of a block of faces with a block of
rows, and what follows from them, on the chip. No program waits for another or adds to what another wrote, so results
repeat. Import this module for tensors on a card only: it imports Triton. Triton multiplies on tensor cores from compute
capability 8.0 on. On older cards the products spill to memory, so they must not take these kernels.

The rows are normalised before they are rounded. So a probability needs no factor of its row, and the gradient through
the normalisation is what :func:`gradient_of_rows` says. The positive class is masked here. Its gradient is added in
float32, for a face by :func:`gradient_of_faces`, for a row by :func:`gradient_of_rows` and :func:`move_rows`.

Legend: G faces of the global batch, D embedding, N rows of this rank, S rows that take part, T rows of one tile.
F blocks of faces, C blocks of rows. M, K: rows and columns of a matrix whose blocks may be skipped.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fr_core.heads import streamed
from fr_core.heads.margins import Hard
from fr_core.heads.streamed import TileSGD

LARGEST_SCALE = 75.0  # of a constant reference, see one_pass_reference
HALF_GAIN = 2.0**14  # of exponentials in float16; times a hard negative's slope, at most 3 · 2¹⁴, they stay below 65504
STAGES = ((64, 3), (64, 4), (32, 4))  # numbers of a step and steps in flight; all cards have room for the first
MASKED = tl.constexpr(streamed.MASKED)
MIN_NORM = tl.constexpr(streamed.MIN_NORM)


class Exponentials(NamedTuple):
    """What :func:`exponentials` found in a tile."""

    values_GT: Tensor
    """gain · exp(logit − reference) · d logit / d (scale·cos), in the type of the operands; 0 where a row is no
    negative of a face."""
    sums_CG: Tensor
    """Sums of exp(logit − reference) over each block of rows, float32, before rounding."""
    alive_FC: Tensor
    """int8; 0: every exponential of the block is below the filter's eps, and none was written."""


class Alive(NamedTuple):
    """The blocks that are not skipped, as lists: first one for each block of faces, then one for each block of rows."""

    block_LB: Tensor
    """int32, the numbers of the blocks, in order."""
    count_L: Tensor
    """int32, how many there are."""


class Positives(NamedTuple):
    """The faces of each row, and how strongly they pull."""

    unit_GD: Tensor
    """Faces of length 1, float32."""
    pull_G: Tensor
    """p − 1 of the positive class, times the margin's slope, float32; see ``with_margin``."""
    face_G: Tensor
    """int64, the faces, in the order of their rows."""
    first_S: Tensor
    """int64 [S + 1], where each row's faces begin in ``face_G``."""


@triton.jit
def _logits(
    unit_GD, centres_TD, own_G, labels_T, above_G, t, faces, rows, G, T, start, scale, drop_above,
    D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return the logits of some faces and rows, and their derivative by scale · cosine.

    A logit is MASKED where there is no negative, or no row of the tile.
    """
    unit_G1 = unit_GD + tl.minimum(faces, G - 1).to(tl.int64)[:, None] * D
    centres_1T = centres_TD + tl.minimum(rows, T - 1).to(tl.int64)[None, :] * D
    cosines = tl.zeros((BLOCK_G, BLOCK_T), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        unit = tl.load(unit_G1 + d[None, :], mask=d[None, :] < D, other=0)
        centres = tl.load(centres_1T + d[:, None], mask=d[:, None] < D, other=0)
        cosines = tl.dot(unit, centres, cosines, input_precision="ieee")
    own = tl.load(own_G + faces, mask=faces < G, other=-1).to(tl.int32)
    labels = start + rows
    if labels_T is not None:
        labels = tl.load(labels_T + rows, mask=rows < T, other=-1).to(tl.int32)
    masked = (own[:, None] == labels[None, :]) | (cosines > drop_above) | (rows >= T)[None, :]
    slopes = tl.full((BLOCK_G, BLOCK_T), 1.0, tl.float32)
    if above_G is not None:
        above = tl.load(above_G + faces, mask=faces < G, other=2)
        hard = cosines > above[:, None]
        ease = tl.load(t)
        slopes = tl.where(hard, ease + 2 * cosines, 1.0)
        cosines = tl.where(hard, cosines * (ease + cosines), cosines)
    return tl.where(masked, MASKED, scale * cosines), slopes


INTERPRETED = not isinstance(_logits, triton.JITFunction)


def _configs(name: str) -> list[triton.Config]:
    """Return the ways to compile a product, of which Triton takes the fastest; ``name``: its sums' block."""
    if INTERPRETED:
        return [triton.Config({name: 16})]
    return [triton.Config({name: size}, num_warps=8, num_stages=stages) for size, stages in STAGES]


def _first_if_deterministic(configs: list[triton.Config], *_: object, **__: object) -> list[triton.Config]:
    """Return what Triton may choose from; another way may add in another order."""
    return configs[:1] if torch.are_deterministic_algorithms_enabled() else configs


@triton.autotune(_configs("BLOCK_D"), key=["G", "D"], prune_configs_by={"early_config_prune": _first_if_deterministic})
@triton.jit
def _log_sum_exp(
    unit_GD, centres_TD, own_G, labels_T, above_G, t, out_CG, G, T, start, scale, drop_above,
    D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    faces = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    logits, _ = _logits(
        unit_GD, centres_TD, own_G, labels_T, above_G, t, faces, rows, G, T, start, scale, drop_above,
        D, BLOCK_G, BLOCK_T, BLOCK_D,
    )  # fmt: skip
    top = tl.maximum(tl.max(logits, 1), -2 * scale)  # so that a masked logit is no top
    value = top + tl.log(tl.sum(tl.exp(logits - top[:, None]), 1))
    tl.store(out_CG + tl.program_id(1) * G + faces, value, mask=faces < G)


@triton.autotune(_configs("BLOCK_D"), key=["G", "D"], prune_configs_by={"early_config_prune": _first_if_deterministic})
@triton.jit
def _exponentials(
    unit_GD, centres_TD, own_G, labels_T, above_G, t, reference_G, out_GT, sums_CG, alive_FC, G, T, start, scale,
    drop_above, gain, eps, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    faces = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    logits, slopes = _logits(
        unit_GD, centres_TD, own_G, labels_T, above_G, t, faces, rows, G, T, start, scale, drop_above,
        D, BLOCK_G, BLOCK_T, BLOCK_D,
    )  # fmt: skip
    reference = tl.load(reference_G + faces, mask=faces < G, other=0)
    values = tl.where(faces[:, None] < G, tl.exp(logits - reference[:, None]), 0)
    tl.store(sums_CG + tl.program_id(1) * G + faces, tl.sum(values, 1), mask=faces < G)
    alive = tl.max(tl.where(values < eps, 0, 1))  # NaN is not below eps, so that it is never skipped
    tl.store(alive_FC + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), alive.to(tl.int8))
    if alive > 0:
        out = out_GT + faces.to(tl.int64)[:, None] * T + rows[None, :]
        tl.store(
            out, (gain * values * slopes).to(out_GT.dtype.element_ty), mask=(faces < G)[:, None] & (rows < T)[None, :]
        )


@triton.jit
def _list_alive(alive_FC, block_LB, count_L, F, C, WIDTH: tl.constexpr):
    """List the blocks of one block of faces, or of one block of rows."""
    line, at = tl.program_id(0), tl.arange(0, WIDTH)
    place = line * C + at  # along the rows
    there = at < C
    if line >= F:  # along the faces
        place = at * C + line - F
        there = at < F
    alive = tl.load(alive_FC + place, mask=there, other=0).to(tl.int32)
    tl.store(block_LB + line * WIDTH + tl.cumsum(alive, 0) - alive, at, mask=alive > 0)
    tl.store(count_L + line, tl.sum(alive, 0))


@triton.autotune(
    _configs("BLOCK_K"),
    key=["M", "D"],
    restore_value=["out_MD"],
    prune_configs_by={"early_config_prune": _first_if_deterministic},
)
@triton.jit
def _add_product(
    out_MD, left_MK, right_KD, block_LB, count_L, M, K, stride_M, stride_K, line, WIDTH,
    KEEP: tl.constexpr, D: tl.constexpr, SKIP_M: tl.constexpr, SKIP_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute out ← KEEP·out + left·right over the blocks [SKIP_M, SKIP_K] of ``left`` that are alive."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    line += tl.program_id(0) * BLOCK_M // SKIP_M
    left_M1 = left_MK + m.to(tl.int64)[:, None] * stride_M
    parts: tl.constexpr = SKIP_K // BLOCK_K
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.load(count_L + line) * parts):
        block = tl.load(block_LB + line * WIDTH + step // parts)
        k = block * SKIP_K + step % parts * BLOCK_K + tl.arange(0, BLOCK_K)
        here, wide_k = k < K, k.to(tl.int64)
        left = tl.load(left_M1 + wide_k[None, :] * stride_K, mask=(m < M)[:, None] & here[None, :], other=0)
        right = tl.load(right_KD + wide_k[:, None] * D + n[None, :], mask=here[:, None] & (n < D)[None, :], other=0)
        total = tl.dot(left, right, total, input_precision="ieee")
    out = out_MD + m.to(tl.int64)[:, None] * D + n[None, :]
    there = (m < M)[:, None] & (n < D)[None, :]
    if KEEP:
        total += tl.load(out, mask=there)
    tl.store(out, total, mask=there)


@triton.jit
def _unit(weight_ND, row, there, d, D: tl.constexpr):
    """Return some rows, and 1 / length of each."""
    weight = tl.load(weight_ND + row.to(tl.int64)[:, None] * D + d[None, :], mask=there, other=0)
    return weight, 1 / tl.maximum(tl.sqrt(tl.sum(weight * weight, 1)), MIN_NORM)


@triton.jit
def _unit_rows(weight_ND, rows_S, out_TD, T, start, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    t, d = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    there = (t < T)[:, None] & (d < D)[None, :]
    row = start + t
    if rows_S is not None:
        row = tl.load(rows_S + row, mask=t < T, other=0)
    weight, inverse = _unit(weight_ND, row, there, d, D)
    out = out_TD + t.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out, (weight * inverse[:, None]).to(out_TD.dtype.element_ty), mask=there)


@triton.jit
def _finish_rows(
    product_TD, weight_ND, rows_S, unit_GD, pull_G, face_G, first_S, each, finite, momentum_ND, T, start, shrink,
    lr, momentum, weight_decay, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Turn products with faces into gradients in place, or move the rows by them if there is a momentum."""
    t, d = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    there = (t < T)[:, None] & (d < D)[None, :]
    product = product_TD + t.to(tl.int64)[:, None] * D + d[None, :]
    gradient = tl.load(product, mask=there, other=0) * shrink
    place = tl.load(first_S + start + t, mask=t < T, other=0)
    end = tl.load(first_S + start + t + 1, mask=t < T, other=0)
    for _ in range(tl.max(end - place)):
        face = tl.load(face_G + place, mask=place < end, other=0)
        pull = tl.load(pull_G + face, mask=place < end, other=0)
        here = there & (place < end)[:, None]
        gradient += pull[:, None] * tl.load(unit_GD + face[:, None] * D + d[None, :], mask=here, other=0)
        place += 1
    row = start + t
    if rows_S is not None:
        row = tl.load(rows_S + row, mask=t < T, other=0)
    weight, inverse = _unit(weight_ND, row, there, d, D)
    unit = weight * inverse[:, None]
    gradient -= tl.sum(gradient * unit, 1)[:, None] * unit
    gradient *= tl.load(each) * inverse[:, None]
    if momentum_ND is None:
        tl.store(product, gradient, mask=there)
    elif tl.load(finite):
        at = row.to(tl.int64)[:, None] * D + d[None, :]
        step = momentum * tl.load(momentum_ND + at, mask=there, other=0) + gradient + weight_decay * weight
        tl.store(momentum_ND + at, step, mask=there)
        tl.store(weight_ND + at, weight - lr * step, mask=there)


def gain(precision: torch.dtype) -> float:
    """Return the factor of exponentials in a type: float16 would round those below 6e-8 to 0.

    With the factor 2¹⁴ they keep 11 bits down to 2⁻²⁸ = 3.7e-9, and those below 2⁻³⁹ = 1.8e-12 become 0.
    """
    return HALF_GAIN if precision == torch.float16 else 1.0


def one_pass_reference(unit_GD: Tensor, scale: float, precision: torch.dtype) -> Tensor | None:
    """Return the reference [G] with which Σ exp and Σ exp·w need one pass over fixed centres; None: there is none.

    It is r = max(0, scale − 64). A cosine of rounded operands is below 1.01, so exponents lie between −1.01·scale − r
    and 1.01·scale − r. Up to scale 75 this is −87 to 65: exp neither leaves float32's and bfloat16's normal numbers
    [1.2e-38, 3.4e38], nor does the sum over up to 10¹⁰ centres. Beyond 75, and in float16, take a first pass by
    :func:`log_sum_exp`: its result is a reference for any scale.
    """
    if scale > LARGEST_SCALE or precision == torch.float16:
        return None
    return unit_GD.new_full((len(unit_GD),), max(0.0, scale - 64), dtype=torch.float32)


def block_sizes(precision: torch.dtype) -> tuple[int, int]:
    """Return the faces and the rows of a block, of which each program has one and the filter skips some."""
    if INTERPRETED:
        return 16, 16
    return (128, 256) if precision.itemsize == 2 else (64, 64)


def unit_rows(weight_ND: Tensor, rows_S: Tensor | None, start: int, rows: int, precision: torch.dtype) -> Tensor:
    """Return rows [start, start + T) of length 1, as operands [T, D].

    Args:
        weight_ND: float32, contiguous.
        rows_S: int64, the rows that take part; None: all.
        rows: T.
        precision: type of the operands.
    """
    embedding = weight_ND.shape[1]
    out_TD = weight_ND.new_empty(rows, embedding, dtype=precision)
    _unit_rows[_row_grid(out_TD)](weight_ND, rows_S, out_TD, rows, start, embedding, *_row_blocks(embedding))
    return out_TD


def log_sum_exp(
    unit_GD: Tensor,
    centres_TD: Tensor,
    own_G: Tensor,
    scale: float,
    drop_above: float = 1.0,
    start: int = 0,
    labels_T: Tensor | None = None,
    hard: Hard | None = None,
) -> Tensor:
    """Return log Σ exp(scale·cos) over the negatives in each block of rows: float32 [C, G].

    ``logsumexp(0)`` over the blocks of all tiles gives the whole. Each block has its own maximum, so no scale is too
    large. It is −∞ where a block has no negative.

    Args:
        unit_GD: faces of length 1, contiguous; their type is that of the products. Sums are float32.
        centres_TD: rows of length 1, contiguous, of the same type.
        own_G: int64; with ``labels_T`` the label of each face, else the place of its row, negative if held elsewhere.
        drop_above: rows with a larger cosine are no negatives; 1 keeps all.
        start: place of the tile's first row.
        labels_T: int64; a row with the label of a face is no negative of it.
        hard: the rule for hard negatives, whose logits are others; float32.
    """
    faces, embedding = unit_GD.shape
    block_G, block_T = block_sizes(unit_GD.dtype)
    grid = triton.cdiv(faces, block_G), triton.cdiv(len(centres_TD), block_T)
    out_CG = unit_GD.new_empty(grid[1], faces, dtype=torch.float32)
    drop_above = drop_above if drop_above < 1 else math.inf
    _log_sum_exp[grid](
        unit_GD, centres_TD, own_G, labels_T, *(hard or (None, None)), out_CG, faces, len(centres_TD), start, scale,
        drop_above, D=embedding, BLOCK_G=block_G, BLOCK_T=block_T,
    )  # fmt: skip
    return out_CG


def exponentials(
    unit_GD: Tensor,
    centres_TD: Tensor,
    own_G: Tensor,
    reference_G: Tensor,
    scale: float,
    drop_above: float = 1.0,
    start: int = 0,
    labels_T: Tensor | None = None,
    eps: float = 0.0,
    hard: Hard | None = None,
) -> Exponentials:
    """Return exp(scale·cos − reference) of the negatives of a tile, those of hard negatives times their logit's slope.

    With the logarithm of the softmax's denominator as the reference they are probabilities. Those of fixed centres may
    have :func:`one_pass_reference`.

    The filter skips a block whose probabilities are all below ``eps`` (Cut Cross Entropy: Wijmans et al., ICLR 2025,
    Section 4.3). Let c = scale·grad / G, as in :func:`gradient_of_faces`. A face loses less than eps a skipped row, so
    its gradient moves by less than c·eps·(skipped rows of the face). The gradient of a row moves by less than
    c·eps·(skipped faces of the row) / length of the row. A bound of δ·c for every face needs eps = δ / identities. Hard
    negatives have up to three times these errors.

    Args:
        reference_G: float32.
        eps: threshold of the filter; 0 skips nothing. Skipped blocks are not written: use :func:`add_products`.

    See :func:`log_sum_exp` for the others.
    """
    (faces, embedding), rows = unit_GD.shape, len(centres_TD)
    block_G, block_T = block_sizes(unit_GD.dtype)
    grid = triton.cdiv(faces, block_G), triton.cdiv(rows, block_T)
    found = Exponentials(
        unit_GD.new_empty(faces, rows),
        unit_GD.new_empty(grid[1], faces, dtype=torch.float32),
        unit_GD.new_empty(grid, dtype=torch.int8),
    )
    drop_above = drop_above if drop_above < 1 else math.inf
    _exponentials[grid](
        unit_GD, centres_TD, own_G, labels_T, *(hard or (None, None)), reference_G, *found, faces, rows, start, scale,
        drop_above, gain(unit_GD.dtype), eps, D=embedding, BLOCK_G=block_G, BLOCK_T=block_T,
    )  # fmt: skip
    return found


def list_alive(alive_FC: Tensor) -> Alive:
    """Return the blocks that the filter does not skip. Their number is ``count_L[:F].sum()``."""
    face_blocks, row_blocks = alive_FC.shape
    width = triton.next_power_of_2(max(alive_FC.shape))
    block_LB = alive_FC.new_empty(face_blocks + row_blocks, width, dtype=torch.int32)
    count_L = alive_FC.new_empty(face_blocks + row_blocks, dtype=torch.int32)
    _list_alive[(face_blocks + row_blocks,)](alive_FC, block_LB, count_L, face_blocks, row_blocks, WIDTH=width)
    return Alive(block_LB, count_L)


def add_products_of_faces(sum_GD: Tensor, found: Exponentials, centres_TD: Tensor, alive: Alive) -> None:
    """Add exponentials · centres to ``sum_GD``, float32, in place. The sum has the :func:`gain` of their type."""
    block_G, block_T = block_sizes(centres_TD.dtype)
    _product(sum_GD, found.values_GT, centres_TD, alive, 0, True, block_G, block_T)


def products_of_rows(found: Exponentials, unit_GD: Tensor, alive: Alive, out_TD: Tensor) -> None:
    """Write exponentialsᵀ · faces to ``out_TD``, float32, contiguous. It has the :func:`gain` of their type."""
    block_G, block_T = block_sizes(unit_GD.dtype)
    _product(out_TD, found.values_GT.T, unit_GD, alive, len(found.alive_FC), False, block_T, block_G)


def _product(
    out_MD: Tensor, left_MK: Tensor, right_KD: Tensor, alive: Alive, line: int, keep: bool, skip_M: int, skip_K: int
) -> None:
    rows, embedding = out_MD.shape
    block = min(skip_M, 128)
    _add_product[triton.cdiv(rows, block), triton.cdiv(embedding, block)](
        out_MD, left_MK, right_KD, *alive, rows, len(right_KD), *left_MK.stride(), line, alive.block_LB.shape[1],
        KEEP=keep, D=embedding, SKIP_M=skip_M, SKIP_K=skip_K, BLOCK_M=block, BLOCK_N=block,
    )  # fmt: skip


def sort_positives(unit_GD: Tensor, pull_G: Tensor, column_G: Tensor, rows: int) -> Positives:
    """Return the faces of each of S rows; once a step.

    Args:
        column_G: int64, the place of each face's row, negative if held elsewhere.
        rows: S.
    """
    sorted_G, face_G = column_G.sort(stable=True)
    first_S = torch.searchsorted(sorted_G, torch.arange(rows + 1, device=column_G.device))
    return Positives(unit_GD, pull_G, face_G, first_S)


def gradient_of_faces(
    sum_GD: Tensor, precision: torch.dtype, positive_GD: Tensor, pull_G: Tensor, column_G: Tensor, each: Tensor
) -> Tensor:
    """Return the part of the faces' gradient that comes from this rank's rows: each · (Σ p·w/‖w‖ + pull·w⁺/‖w⁺‖).

    Args:
        sum_GD: the sums of all tiles, from :func:`add_products_of_faces`.
        precision: type of their operands.
        positive_GD: rows of the faces' classes, of length 1, float32; any numbers where ``column_G`` is negative.
        each: scale · grad / G on the device, float32; d loss / d cos = each · p.
    """
    own_G = torch.where(column_G >= 0, pull_G, 0)
    return torch.addcmul(sum_GD / gain(precision), own_G[:, None], positive_GD).mul_(each)


def gradient_of_rows(
    product_TD: Tensor,
    weight_ND: Tensor,
    rows_S: Tensor | None,
    start: int,
    positives: Positives,
    each: Tensor,
    precision: torch.dtype,
) -> None:
    """Turn :func:`products_of_rows` into the gradient of the rows, in place, through their normalisation.

    With v = Σ p·x over the faces, plus the pulls of the row's own faces: each · (v − (v·u)·u) / ‖w‖, u = w / ‖w‖. The
    part along the row is taken from v itself, so it goes to the last bit, whatever p was rounded to.

    Args:
        weight_ND: float32, contiguous.
        rows_S: int64, the rows that take part; None: all.
        start: place of the tile's first row.
        each: scale · grad / G on the device, float32.
        precision: type of the operands of the product.
    """
    _finish(product_TD, weight_ND, rows_S, start, positives, each, precision, None, None, 0.0, 0.0, 0.0)


def move_rows(
    product_TD: Tensor,
    weight_ND: Tensor,
    rows_S: Tensor | None,
    start: int,
    positives: Positives,
    each: Tensor,
    precision: torch.dtype,
    sgd: TileSGD,
    finite: Tensor,
) -> None:
    """Move the rows by SGD, in place: m ← μ·m + gradient + λ·w, w ← w − lr·m; see :func:`gradient_of_rows`.

    Args:
        finite: a truth value on the device; if it is false, nothing moves.
    """
    settings = sgd.lr, sgd.momentum, sgd.weight_decay
    _finish(product_TD, weight_ND, rows_S, start, positives, each, precision, finite, sgd.momentum_ND, *settings)


def _finish(
    product_TD: Tensor,
    weight_ND: Tensor,
    rows_S: Tensor | None,
    start: int,
    positives: Positives,
    each: Tensor,
    precision: torch.dtype,
    finite: Tensor | None,
    momentum_ND: Tensor | None,
    *settings: float,
) -> None:
    _finish_rows[_row_grid(product_TD)](
        product_TD, weight_ND, rows_S, *positives, each, finite, momentum_ND, len(product_TD), start,
        1 / gain(precision), *settings, product_TD.shape[1], *_row_blocks(product_TD.shape[1]),
    )  # fmt: skip


def _row_blocks(embedding: int) -> tuple[int, int]:
    """Return the rows of a program that reads them whole, and their padded length."""
    padded = triton.next_power_of_2(embedding)
    return max(1, 2048 // padded), padded


def _row_grid(x_TD: Tensor) -> tuple[int]:
    rows, _ = _row_blocks(x_TD.shape[1])
    return (triton.cdiv(len(x_TD), rows),)

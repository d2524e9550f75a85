"""Verification and identification of templates: several photos of a person as one (IJB-B, IJB-C; METHODS §7).

Legend: N images, T templates, P pairs, G gallery templates, Q probes, D embedding.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from fr_core.errors import UserError

BLOCK = 512  # templates, or probes, that are compared with all others at once
RANKS = (1, 5, 10)
FPIRS = (1e-1, 1e-2)


def pooled(
    features_ND: np.ndarray,
    templates_N: np.ndarray,
    media_N: np.ndarray | None = None,
    weights_N: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One feature per template: the mean within each medium (frames of a film are alike), their sum, normalised.

    Args:
        features_ND: of the images, their norms kept: poor photos have small ones and so count less.
        templates_N, media_N: the template and the medium of each image; without media, the plain mean of all images.
        weights_N: such as the detector's scores.

    Returns:
        The templates' numbers, rising, and float32 [T, D].
    """
    weighted_ND = features_ND if weights_N is None else features_ND * weights_N[:, None].astype(np.float32)
    media_N = np.arange(len(templates_N)) if media_N is None else media_N
    order = np.lexsort((media_N, templates_N))
    template, medium = templates_N[order], media_N[order]
    begins = np.flatnonzero(np.diff(template, prepend=template[:1] - 1) | np.diff(medium, prepend=medium[:1] - 1))
    counts = np.diff(begins, append=len(order))
    means = np.add.reduceat(weighted_ND[order], begins) / counts[:, None].astype(np.float32)
    numbers, first = np.unique(template[begins], return_index=True)
    sums_TD = np.add.reduceat(means, first)
    return numbers, sums_TD / np.maximum(np.linalg.norm(sums_TD, axis=1, keepdims=True), 1e-12)


def pair_cosines(features_TD: np.ndarray, left_P: np.ndarray, right_P: np.ndarray) -> np.ndarray:
    """Cosines of pairs of templates: float32 [P].

    A block of templates is multiplied with all others and the pairs are picked from that: the protocols have so many
    pairs (IJB-C 15.7 million of 23,124 templates) that gathering both features of each takes 2.5 times as long.

    Args:
        features_TD: normalised.
        left_P, right_P: rows of it.
    """
    scores = np.empty(len(left_P), np.float32)
    order = np.argsort(left_P, kind="stable")
    begins = np.arange(0, len(features_TD), BLOCK)
    ends = np.searchsorted(left_P, np.append(begins, len(features_TD)), sorter=order)
    for begin, (first, last) in zip(begins, itertools.pairwise(ends), strict=True):
        if last > first:
            chosen = order[first:last]
            block = features_TD[begin : begin + BLOCK] @ features_TD.T
            scores[chosen] = block[left_P[chosen] - begin, right_P[chosen]]
    return scores


@dataclass(frozen=True)
class Identification:
    """Scores of a search for every probe in a gallery."""

    at_rank: dict[int, float]  # rank -> share of the mated probes whose person is among the first so many
    tpir_at_fpir: dict[float, float]  # as far as the unmated probes can resolve it
    mated: int  # probes whose person is in the gallery
    unmated: int


def identify(
    gallery_GD: np.ndarray, people_G: np.ndarray, probes_QD: np.ndarray, people_Q: np.ndarray
) -> Identification:
    """Searches every probe in the gallery, closed and open set.

    A person in the gallery counts by its best template; ties count against the probe. Open set: at a threshold that at
    most FPIR of the unmated probes reach with anybody, TPIR of the mated ones find their person first and reach it.

    Args:
        gallery_GD, probes_QD: normalised features; one of zeros, of a template that could not be read, matches nobody.
        people_G, people_Q: int, who they are.

    Raises:
        UserError: an empty gallery, no probe whose person is in it, or features that are not finite.
    """
    if not (np.isfinite(gallery_GD).all() and np.isfinite(probes_QD).all()):
        raise UserError("the templates' features are not finite")
    known, column_G = np.unique(people_G, return_inverse=True)
    mated_Q = np.isin(people_Q, known)
    if not mated_Q.any():
        raise UserError("no probe's person is in the gallery")
    own_Q = np.searchsorted(known, people_Q)  # meaningless for the unmated
    order = np.argsort(column_G, kind="stable")
    begins = np.searchsorted(column_G[order], np.arange(len(known)))
    unread_G, unread_Q = (gallery_GD == 0).all(1), (probes_QD == 0).all(1)
    rank_Q, own_score_Q = np.zeros(len(people_Q), np.int64), np.full(len(people_Q), -np.inf, np.float32)
    best_Q = np.empty(len(people_Q), np.float32)
    for start in range(0, len(people_Q), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(people_Q)))
        cosines = probes_QD[rows] @ gallery_GD.T
        cosines[:, unread_G] = cosines[unread_Q[rows]] = -1
        scores = np.maximum.reduceat(cosines[:, order], begins, axis=1)
        best_Q[rows] = scores.max(1)
        mated = rows[mated_Q[rows]]
        theirs = scores[mated - start]
        own = np.take_along_axis(theirs, own_Q[mated, None], 1)
        rank_Q[mated] = (theirs >= own).sum(1)  # itself among them
        own_score_Q[mated] = own[:, 0]
    ranks, scores = rank_Q[mated_Q], own_score_Q[mated_Q]
    others = np.sort(best_Q[~mated_Q])
    tpirs = {}
    for fpir in (f for f in FPIRS if f * len(others) >= 1):
        bound = others[len(others) - 1 - int(fpir * len(others) + 1e-9)]
        tpirs[fpir] = float(((ranks == 1) & (scores > bound)).mean())
    return Identification(
        {rank: float((ranks <= rank).mean()) for rank in RANKS if rank <= len(known)},
        tpirs,
        int(mated_Q.sum()),
        len(others),
    )

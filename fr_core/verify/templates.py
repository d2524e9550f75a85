"""Verification and identification of templates, as IJB-B and IJB-C do it (docs/verification.md).

A template is a set of photos of one person, which is compared as a whole.
Legend: N images, T templates, P pairs, G gallery templates, Q probes, D embedding.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from fr_core.errors import UserError

BLOCK = 512  # templates or probes that are compared with all others at once
RANKS = (1, 5, 10)
FPIRS = (1e-1, 1e-2)


def pooled(
    features_ND: np.ndarray,
    templates_N: np.ndarray,
    media_N: np.ndarray | None = None,
    weights_N: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return one feature for each template: the normalised sum of the means within its media.

    A medium is a photo or a film. Frames of a film are similar, so all of them together count as one photo.

    Args:
        features_ND: Features of the images, not normalised: poor photos have small norms and so count less.
        templates_N: Template of each image.
        media_N: Medium of each image; None: every image is a medium of its own.
        weights_N: Weight of each image, such as the detector's score.

    Returns:
        The templates' numbers, rising, and their features float32 [T, D].
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
    """Return the cosines of pairs of templates: float32 [P].

    Blocks of templates are multiplied by all templates, and the pairs are picked from the products. IJB-C has 15.7
    million pairs of 23,124 templates. Gathering both features of each pair takes 2.5 times as long.

    Args:
        features_TD: Features of length 1.
        left_P, right_P: Rows of ``features_TD``.
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
    """Figures of a search for every probe in a gallery (:mod:`fr_core.verify.report` defines TPIR and FPIR)."""

    at_rank: dict[int, float]  # rank k -> share of the mated probes whose person is among the first k
    tpir_at_fpir: dict[float, float]  # FPIR -> TPIR, for each FPIR of at least one unmated probe
    mated: int  # probes whose person is in the gallery
    unmated: int  # probes whose person is not in the gallery


def identify(
    gallery_GD: np.ndarray, people_G: np.ndarray, probes_QD: np.ndarray, people_Q: np.ndarray
) -> Identification:
    """Search every probe in the gallery, closed-set (ranks) and open-set (TPIR at FPIR).

    The score of a person in the gallery is that of the person's best template. Ties count against the probe.

    Args:
        gallery_GD, probes_QD: Features of length 1. A feature of zeros, of a template that could not be read, matches
            nobody.
        people_G, people_Q: int, the person of each template.

    Raises:
        UserError: The gallery is empty or has no probe's person, or features are not finite.
    """
    if not (np.isfinite(gallery_GD).all() and np.isfinite(probes_QD).all()):
        raise UserError("the templates' features are not finite: the net's weights are broken, or training diverged")
    known, column_G = np.unique(people_G, return_inverse=True)
    mated_Q = np.isin(people_Q, known)
    if not mated_Q.any():
        raise UserError("no probe's person is in the gallery: give a gallery and probes with common people")
    own_Q = np.searchsorted(known, people_Q)  # meaningless for unmated probes
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
        rank_Q[mated] = (theirs >= own).sum(1)  # the rank of the best score is 1
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

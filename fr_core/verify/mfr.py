"""Masked-face recognition (MFR): FNMR at a fixed FMR over all pairs of images.

The protocol is that of the WebFace260M track (Zhu et al., "Masked Face Recognition Challenge: The WebFace260M Track
Report", 2021; docs/methods/bigface.md). Data are aligned crops,
``standard/NAME/*.jpg`` and ``masked/NAME/*.jpg``. «Standard» compares all pairs of standard images, «masked» all pairs
of a masked and a standard image. The score is 0.25 · masked + 0.75 · standard. :mod:`fr_core.verify.report` defines
FNMR and FMR.

Legend: N probes, M gallery, D embedding.
"""

from dataclasses import dataclass

import numpy as np

from fr_core.errors import UserError

FMRS = (1e-3, 1e-4, 1e-5, 1e-6)
FMR = 1e-5  # of the score
WEIGHTS = {"masked": 0.25, "standard": 0.75}
BLOCK = 1024  # most probes that are compared with the whole gallery at once
COSINES = 2**24  # most cosines in memory at once


@dataclass(frozen=True)
class NonMatches:
    """Error rates over all pairs of two sets of images."""

    fnmr: dict[float, float]  # FMR -> FNMR, for each FMR of at least one impostor pair
    genuine: int  # pairs of one person
    impostors: int  # pairs of two people


def nonmatches(
    probes_ND: np.ndarray,
    people_N: np.ndarray,
    gallery_MD: np.ndarray | None = None,
    people_M: np.ndarray | None = None,
) -> NonMatches:
    """Return FNMR at FMR over all pairs of a probe and a gallery image; without a gallery over all pairs of probes.

    An FMR allows k impostor pairs to match. A pair matches if its cosine is greater than that of impostor pair k + 1,
    counted from the greatest cosine. A tie does not match. Memory holds all genuine cosines, and the greatest
    thousandth of the impostor cosines.

    Args:
        probes_ND, gallery_MD: Embeddings of length 1.
        people_N, people_M: int, the identity of each image.

    Raises:
        UserError: There is no genuine pair or no impostor pair, or embeddings are not finite.
    """
    alone = gallery_MD is None
    gallery_MD, people_M = (probes_ND, people_N) if gallery_MD is None or people_M is None else (gallery_MD, people_M)
    if not (np.isfinite(probes_ND).all() and np.isfinite(gallery_MD).all()):
        raise UserError("the net's embeddings are not finite, or all 0: training diverged, or the weights are broken")
    everybody = np.unique(np.concatenate([people_N, people_M]))
    counts_N, counts_M = (np.searchsorted(everybody, people) for people in (people_N, people_M))
    own = np.bincount(counts_N, minlength=len(everybody)) * np.bincount(counts_M, minlength=len(everybody))
    genuine, total = int(own.sum()), len(people_N) * len(people_M)
    impostors = total - genuine
    if alone:
        genuine, impostors = (genuine - len(people_N)) // 2, impostors // 2
    if not genuine or not impostors:
        raise UserError("MFR needs both pairs of one person and pairs of two people: add images")
    fmrs = [fmr for fmr in FMRS if fmr * impostors >= 1]
    most = int((fmrs[0] if fmrs else 0) * impostors + 1e-9) + 1
    genuine_parts: list[np.ndarray] = []
    top = np.empty(0, np.float32)  # greatest cosines of impostor pairs
    block = max(1, min(BLOCK, COSINES // len(gallery_MD)))
    for start in range(0, len(probes_ND), block):
        part, first = slice(start, start + block), start if alone else 0
        cosines, same = probes_ND[part] @ gallery_MD[first:].T, people_N[part, None] == people_M[first:]
        if alone:  # each pair once
            upper = np.triu_indices(len(cosines), 1, cosines.shape[1])
            cosines, same = cosines[upper], same[upper]
        genuine_parts.append(cosines[same])
        top = np.concatenate([top, cosines[~same]])
        if len(top) > most:
            top = np.partition(top, len(top) - most)[-most:]
    top, genuine_cosines = np.sort(top)[::-1], np.sort(np.concatenate(genuine_parts))
    bounds = {fmr: top[int(fmr * impostors + 1e-9)] for fmr in fmrs}
    misses = {fmr: np.searchsorted(genuine_cosines, bound, "right") for fmr, bound in bounds.items()}
    return NonMatches({fmr: float(count / genuine) for fmr, count in misses.items()}, genuine, impostors)


def score(results: dict[str, NonMatches]) -> float | None:
    """Return 0.25 · masked + 0.75 · standard FNMR at FMR 1e-5, or None for too few pairs to measure that FMR."""
    if any(FMR not in result.fnmr for result in results.values()):
        return None
    return sum(weight * results[name].fnmr[FMR] for name, weight in WEIGHTS.items())

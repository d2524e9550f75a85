"""Masked-face recognition (MFR, WebFace260M track): every image against every other, by FNMR at a fixed FMR.

``standard/NAME/*.jpg`` and ``masked/NAME/*.jpg``, aligned crops. Standard: all pairs of standard images. Masked: all
pairs of a masked and a standard image. The score is 0.25 · masked + 0.75 · standard (METHODS §5).

Legend: N probes, M gallery, D embedding.
"""

from dataclasses import dataclass

import numpy as np

from fr_core.errors import UserError

FMRS = (1e-3, 1e-4, 1e-5, 1e-6)
FMR = 1e-5  # the score's
WEIGHTS = {"masked": 0.25, "standard": 0.75}
BLOCK = 1024  # probes compared with the whole gallery at once
COSINES = 2**24  # in memory at once


@dataclass(frozen=True)
class NonMatches:
    """Errors over all pairs of two sets of images."""

    fnmr: dict[float, float]  # FMR -> share of genuine pairs below its threshold, as far as the pairs resolve it
    genuine: int
    impostors: int


def nonmatches(
    probes_ND: np.ndarray,
    people_N: np.ndarray,
    gallery_MD: np.ndarray | None = None,
    people_M: np.ndarray | None = None,
) -> NonMatches:
    """FNMR at FMR over all pairs of a probe and a gallery image, or without a gallery over all pairs of the probes.

    The threshold at an FMR is the lowest cosine that at most this share of the impostor pairs reach; what ties with
    the first impostor beyond them does not match. All genuine cosines are kept in memory, and the
    highest thousandth of the impostors'.

    Args:
        probes_ND, gallery_MD: normalised.
        people_N, people_M: int, who they are.

    Raises:
        UserError: no genuine pair, no impostor pair, or embeddings that are not finite.
    """
    alone = gallery_MD is None
    gallery_MD, people_M = (probes_ND, people_N) if gallery_MD is None or people_M is None else (gallery_MD, people_M)
    if not (np.isfinite(probes_ND).all() and np.isfinite(gallery_MD).all()):
        raise UserError("the net's embeddings are not finite")
    everybody = np.unique(np.concatenate([people_N, people_M]))
    counts_N, counts_M = (np.searchsorted(everybody, people) for people in (people_N, people_M))
    own = np.bincount(counts_N, minlength=len(everybody)) * np.bincount(counts_M, minlength=len(everybody))
    genuine, total = int(own.sum()), len(people_N) * len(people_M)
    impostors = total - genuine
    if alone:
        genuine, impostors = (genuine - len(people_N)) // 2, impostors // 2
    if not genuine or not impostors:
        raise UserError("MFR needs both pairs of one person and pairs of two")
    fmrs = [fmr for fmr in FMRS if fmr * impostors >= 1]
    most = int((fmrs[0] if fmrs else 0) * impostors + 1e-9) + 1
    matches: list[np.ndarray] = []
    top = np.empty(0, np.float32)
    block = max(1, min(BLOCK, COSINES // len(gallery_MD)))
    for start in range(0, len(probes_ND), block):
        part, first = slice(start, start + block), start if alone else 0
        cosines, same = probes_ND[part] @ gallery_MD[first:].T, people_N[part, None] == people_M[first:]
        if alone:  # each pair once
            upper = np.triu_indices(len(cosines), 1, cosines.shape[1])
            cosines, same = cosines[upper], same[upper]
        matches.append(cosines[same])
        top = np.concatenate([top, cosines[~same]])
        if len(top) > most:
            top = np.partition(top, len(top) - most)[-most:]
    top, found = np.sort(top)[::-1], np.sort(np.concatenate(matches))
    beyond = {fmr: top[int(fmr * impostors + 1e-9)] for fmr in fmrs}
    fnmr = {fmr: float(np.searchsorted(found, bound, "right") / genuine) for fmr, bound in beyond.items()}
    return NonMatches(fnmr, genuine, impostors)


def score(results: dict[str, NonMatches]) -> float | None:
    """0.25 · masked + 0.75 · standard at FMR 1e-5, or None where the pairs do not resolve that."""
    if any(FMR not in result.fnmr for result in results.values()):
        return None
    return sum(weight * results[name].fnmr[FMR] for name, weight in WEIGHTS.items())

"""Identities in embedding space: their centres, images that do not belong to them, images that are there twice.

Legend: I images sorted by identity, N identities, D embedding. All embeddings have length 1.
"""

from collections.abc import Iterator

import numpy as np
import torch

from fr_core.device import default_device

TRIMS = 2
BLOCK = 4096  # embeddings that are compared with all centres at once, of up to 16,000
PRODUCTS = 2**26  # cosines in memory at once


def centres(embeddings_ID: np.ndarray, labels_I: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """The mean direction of each identity, and how well each of its images fits in.

    Images that fit badly are trimmed and the mean is taken again, so that wrong ones do not pull it; an identity of
    which nothing would be left keeps all.

    Args:
        labels_I: rising.
        least: cosine to the centre of an identity's other images below which an image is trimmed.

    Returns:
        float32 [N, D] of the identities in ``labels_I``, length 1, and float32 [I]: each image's cosine to the centre
        of the others of its identity that were kept; NaN where there are none.
    """
    begins = np.flatnonzero(np.diff(labels_I, prepend=labels_I[:1] - 1))
    group_I = np.repeat(np.arange(len(begins)), np.diff(begins, append=len(labels_I)))
    kept_I = np.ones(len(labels_I), bool)
    for _ in range(TRIMS + 1):
        sums_ND = np.add.reduceat(embeddings_ID * kept_I[:, None], begins)
        own_I = _to_others(embeddings_ID, sums_ND, group_I, kept_I)
        kept_I = ~(own_I < least)
        kept_I |= ~np.logical_or.reduceat(kept_I, begins)[group_I]
    return sums_ND / np.maximum(np.linalg.norm(sums_ND, axis=1, keepdims=True), 1e-12), own_I


def nearest_centres(
    embeddings_ID: np.ndarray, centres_ND: np.ndarray, own_I: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The centre of another identity that is nearest to each embedding, a block of embeddings at a time.

    Args:
        own_I: the row of each one's own identity, −1 where there is none.

    Yields:
        its row, int64, and the cosine to it, float32; −1 and −1 where there is no other. Centres of zeros are none.
    """
    device = default_device()
    columns_DN = torch.from_numpy(centres_ND).to(device).T
    empty_N = torch.from_numpy(~centres_ND.any(1)).to(device)
    block = max(1, min(BLOCK, PRODUCTS // max(1, len(centres_ND))))
    for start in range(0, len(embeddings_ID), block):
        part = slice(start, start + block)
        cosines = torch.tensor(embeddings_ID[part], device=device) @ columns_DN  # a copy: Arrow's memory is read-only
        own = torch.tensor(own_I[part], device=device)
        rows = torch.arange(len(own), device=device)[own >= 0]
        cosines[rows, own[own >= 0]] = -2
        cosines[:, empty_N] = -2
        best, who = cosines.max(1)
        none = (best < -1.5).cpu().numpy()
        yield np.where(none, -1, who.cpu().numpy()), np.where(none, -1, best.cpu().numpy())


def copies(embeddings_ID: np.ndarray, labels_I: np.ndarray, least: float, usable_I: np.ndarray) -> np.ndarray:
    """For each image the first earlier one of its identity that looks the same (cosine at least ``least``), or −1.

    Only images that are no copies themselves, and are ``usable_I``, are originals: of a film, some frames stay.
    """
    earlier_I = np.full(len(labels_I), -1)
    begins = np.flatnonzero(np.diff(labels_I, prepend=labels_I[:1] - 1))
    for first, last in zip(begins, np.append(begins[1:], len(labels_I)), strict=True):
        originals = np.empty((last - first, embeddings_ID.shape[1]), np.float32)
        numbers: list[int] = []
        for i in np.flatnonzero(usable_I[first:last]) + first:
            alike = originals[: len(numbers)] @ embeddings_ID[i] >= least
            if alike.any():
                earlier_I[i] = numbers[int(alike.argmax())]
            else:
                originals[len(numbers)] = embeddings_ID[i]
                numbers.append(int(i))
    return earlier_I


def _to_others(embeddings_ID: np.ndarray, sums_ND: np.ndarray, group_I: np.ndarray, kept_I: np.ndarray) -> np.ndarray:
    """Cosine of each image to the sum of the kept others: e·(s − e) / |s − e|, without that difference in memory."""
    along_I = np.empty(len(group_I), np.float32)
    for start in range(0, len(group_I), BLOCK):
        part = slice(start, start + BLOCK)
        along_I[part] = np.einsum("id,id->i", embeddings_ID[part], sums_ND[group_I[part]])
    square_I = (sums_ND**2).sum(1)[group_I] - kept_I * (2 * along_I - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        own_I = (along_I - kept_I) / np.sqrt(square_I)
    return np.where(square_I > 1e-6, own_I, np.nan).astype(np.float32)

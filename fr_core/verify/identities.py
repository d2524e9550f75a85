"""Identities in embedding space: their centres, outliers among their images, and duplicate images.

Legend: I images sorted by identity, N identities, D embedding. All embeddings have length 1.
"""

from collections.abc import Iterator

import numpy as np
import torch

from fr_core.device import default_device

TRIMS = 2  # rounds of trimming
BLOCK = 4096  # most embeddings that are compared with all centres at once
PRODUCTS = 2**26  # most cosines in memory at once


def centres(embeddings_ID: np.ndarray, labels_I: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean direction of each identity, and how well each image fits its identity.

    Images that fit badly are trimmed and the mean is computed again, so that wrong images do not pull the mean. An
    identity keeps all its images if trimming would leave none.

    Args:
        embeddings_ID: Embeddings of length 1.
        labels_I: Identity of each image, rising.
        least: An image is trimmed if its cosine to the centre of its identity's other images is below this.

    Returns:
        The centres float32 [N, D] of length 1 for the identities in ``labels_I``, and cosines float32 [I]. The cosine
        of an image is to the centre of the other kept images of its identity; NaN where there are none.
    """
    begins = np.flatnonzero(np.diff(labels_I, prepend=labels_I[:1] - 1))
    group_I = np.repeat(np.arange(len(begins)), np.diff(begins, append=len(labels_I)))
    kept_I = np.ones(len(labels_I), bool)
    for _ in range(TRIMS + 1):
        sums_ND = np.add.reduceat(embeddings_ID * kept_I[:, None], begins)
        cosine_I = _cosines_to_others(embeddings_ID, sums_ND, group_I, kept_I)
        kept_I = ~(cosine_I < least)
        emptied_I = ~np.logical_or.reduceat(kept_I, begins)[group_I]
        kept_I |= emptied_I
    return sums_ND / np.maximum(np.linalg.norm(sums_ND, axis=1, keepdims=True), 1e-12), cosine_I


def nearest_centres(
    embeddings_ID: np.ndarray, centres_ND: np.ndarray, own_I: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Find for each embedding the nearest centre of another identity, a block of embeddings at a time.

    Args:
        embeddings_ID: Embeddings of length 1.
        centres_ND: Centres of length 1. A row of zeros is no centre.
        own_I: Row of each embedding's own identity in ``centres_ND``, or −1 for none.

    Yields:
        The row of the nearest centre, int64, and its cosine, float32. Both are −1 if there is no other centre.
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
    """Return for each image the first earlier image of its identity with a cosine of at least ``least``, or −1.

    Only an image that is ``usable_I`` and is no copy itself can be an original. So some frames of a film stay.
    """
    earlier_I = np.full(len(labels_I), -1)
    begins = np.flatnonzero(np.diff(labels_I, prepend=labels_I[:1] - 1))
    for first, last in zip(begins, np.append(begins[1:], len(labels_I)), strict=True):
        originals = np.empty((last - first, embeddings_ID.shape[1]), np.float32)
        numbers: list[int] = []
        for i in np.flatnonzero(usable_I[first:last]) + first:
            same = originals[: len(numbers)] @ embeddings_ID[i] >= least
            if same.any():
                earlier_I[i] = numbers[int(same.argmax())]
            else:
                originals[len(numbers)] = embeddings_ID[i]
                numbers.append(int(i))
    return earlier_I


def _cosines_to_others(
    embeddings_ID: np.ndarray, sums_ND: np.ndarray, group_I: np.ndarray, kept_I: np.ndarray
) -> np.ndarray:
    """Return e·(s − e) / |s − e| for each embedding e, where s is the sum of its identity's kept embeddings.

    An embedding that is not kept is not in s, and nothing is subtracted. The differences s − e are never in memory.
    """
    along_I = np.empty(len(group_I), np.float32)
    for start in range(0, len(group_I), BLOCK):
        part = slice(start, start + BLOCK)
        along_I[part] = np.einsum("id,id->i", embeddings_ID[part], sums_ND[group_I[part]])
    square_I = (sums_ND**2).sum(1)[group_I] - kept_I * (2 * along_I - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine_I = (along_I - kept_I) / np.sqrt(square_I)
    return np.where(square_I > 1e-6, cosine_I, np.nan).astype(np.float32)

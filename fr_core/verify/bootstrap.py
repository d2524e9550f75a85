"""Confidence intervals of verification figures by the bootstrap over identities.

The pairs of one person share photos, so they are not independent. Each resample therefore draws whole identities with
replacement. A pair of one person counts as often as the person was drawn. A pair of two people counts as often as the
product of both numbers. See Bolle, Ratha, Pankanti, "Error analysis of pattern recognition systems: the subsets
bootstrap", CVIU 2004.

Legend: P pairs, R resamples, I identities.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from fr_core import rng

RESAMPLES = 1000
LEVEL = 0.95
PART = 8_000_000  # weights [R, P] in memory at once


def accuracy_interval(right_P: np.ndarray, people_P2: np.ndarray) -> tuple[float, float]:
    """Return the confidence interval of the accuracy.

    Args:
        right_P: bool, whether the decision on a pair is right.
        people_P2: int, the identities of each pair, numbered from 0.
    """
    accuracies = []
    for weights_RP in pair_weights(people_P2):
        totals_R = np.where(weights_RP.any(1), weights_RP.sum(1), np.nan)
        accuracies.append((weights_RP @ right_P) / totals_R)
    return _ends(accuracies)


def tar_intervals(
    scores_P: np.ndarray, same_P: np.ndarray, people_P2: np.ndarray, fars: Sequence[float]
) -> dict[float, tuple[float, float]]:
    """Return the confidence interval of TAR at each FAR; every resample has its own threshold."""
    order = np.argsort(-scores_P, kind="stable")
    last_of_tie = np.append(np.diff(scores_P[order]) < 0, True)
    genuine = same_P[order]
    found: dict[float, list[np.ndarray]] = {far: [] for far in fars}
    for weights_RP in pair_weights(people_P2[order]):
        tar_RP = np.cumsum(weights_RP * genuine, 1)[:, last_of_tie]
        far_RP = np.cumsum(weights_RP * ~genuine, 1)[:, last_of_tie]
        with np.errstate(invalid="ignore"):  # a resample without pairs of one kind gives NaN and is left out
            tar_RP, far_RP = tar_RP / tar_RP[:, -1:], far_RP / far_RP[:, -1:]
        for far, values in found.items():
            allowed = (far_RP <= far).sum(1)  # rates rise along the row
            reached = np.take_along_axis(tar_RP, np.maximum(allowed - 1, 0)[:, None], 1)[:, 0]
            values.append(np.where(np.isnan(far_RP[:, -1]), np.nan, np.where(allowed > 0, reached, 0)))
    return {far: _ends(values) for far, values in found.items()}


def pair_weights(people_P2: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield how often each pair counts in each resample: float32 [R, P], some resamples at a time."""
    left, right = people_P2.T
    count = int(people_P2.max()) + 1
    random, part = rng.generator(seed, "bootstrap"), max(1, PART // len(people_P2))
    for start in range(0, resamples, part):
        drawn_RI = random.multinomial(count, np.full(count, 1 / count), min(part, resamples - start))
        drawn_RI = drawn_RI.astype(np.float32)
        yield np.where(left == right, drawn_RI[:, left], drawn_RI[:, left] * drawn_RI[:, right])


def _ends(parts: list[np.ndarray]) -> tuple[float, float]:
    """Return the ends of the interval that holds the share ``LEVEL`` of the resampled values."""
    low, high = np.nanpercentile(np.concatenate(parts), (50 * (1 - LEVEL), 50 * (1 + LEVEL)))
    return float(low), float(high)

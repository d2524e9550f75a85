"""Compares two settings run by run: runs of one seed and fold make a pair."""

import math
import statistics
from collections.abc import Mapping, Sequence

from scipy.stats import t

Row = Mapping[str, str]  # a line of a comparison's results


def paired_differences(rows: Sequence[Row], base: Sequence[Row], column: str) -> list[float]:
    """Return how far a column of ``rows`` lies above that of ``base``, for each seed and fold that both have."""
    own, other = ({(row["seed"], row.get("fold", "")): row.get(column) for row in part} for part in (rows, base))
    return [float(own[key]) - float(other[key]) for key in own if own[key] and other.get(key)]  # type: ignore[arg-type]


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of two values or more, and the half-width of its 95 % interval by Student's t."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(t.ppf(0.975, len(values) - 1)) * error

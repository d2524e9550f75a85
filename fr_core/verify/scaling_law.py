"""The scaling law: error as a power of size, E(P) = c + a·P^(−b), fitted over runs (METHODS §5).

The squares of ln E's residuals are minimised. Without the offset c that is a straight line over ln P, and the
intervals, by Student's t with R − 2 degrees of freedom, are exact where ln E scatters normally and alike at all sizes.
An offset c ≥ 0 is what no size mends; its law is linearised at the minimum (delta method, R − 3 degrees), so its
intervals are approximate. It is kept where an F test of the one parameter more rejects c = 0 at 5 %, which takes four
sizes or more. All intervals are of 95 % and know nothing of that choice: where runs are too few to show an offset that
there is, the exponent comes out too small, and its interval with it.

Legend: R runs, Q sizes asked for, K parameters of the law: ln a, b and, with an offset, c.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import f as f_distribution
from scipy.stats import t as t_distribution

from fr_core.errors import UserError

LEVEL = 0.95
SIZES, SIZES_FOR_OFFSET = 3, 4  # different ones, at least
STEEPEST = 10.0  # exponent of a law with an offset, beyond which only the smallest size would matter
STARTS = np.array([0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])  # offsets, of the smallest error
TOLERANCE = 1e-12  # relative, of the fit with an offset
LARGEST_CONDITION = 1e6  # of the derivatives of a law with an offset
ROUNDING = 1e-10  # residuals of ln E below it are none


@dataclass(frozen=True)
class Estimate:
    """The law at some sizes, each [Q]."""

    error: np.ndarray
    curve_low: np.ndarray  # the interval of the law itself
    curve_high: np.ndarray
    run_low: np.ndarray  # the interval of a single new run
    run_high: np.ndarray


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law, in units of the runs' geometric means, where its parameters are near 1."""

    size: float  # geometric mean of the runs' sizes
    error: float  # and of their errors
    theta_K: np.ndarray
    covariance_KK: np.ndarray
    variance: float  # of ln E around the law
    freedom: int  # R − K
    r2: float  # share of ln E's variance that the law explains; 0 where there is none
    offset_p: float | None  # of the F test that there is no offset; None: too few sizes to ask

    @property
    def exponent(self) -> float:
        return float(self.theta_K[1])

    @property
    def exponent_interval(self) -> tuple[float, float]:
        half = self._quantile() * float(np.sqrt(self.covariance_KK[1, 1]))
        return self.exponent - half, self.exponent + half

    @property
    def prefactor(self) -> float:
        return float(self.error * np.exp(self.theta_K[0]) * self.size**self.exponent)

    @property
    def offset(self) -> float:
        return float(self.error * self.theta_K[2]) if len(self.theta_K) == 3 else 0.0

    def at(self, sizes_Q: np.ndarray) -> Estimate:
        """Errors to expect at some sizes, with the intervals of the law and of a single run."""
        log_Q, slopes_QK = _law(self.theta_K, np.log(sizes_Q / self.size))
        spread_Q = np.einsum("qk,kl,ql->q", slopes_QK, self.covariance_KK, slopes_QK)
        curve_Q, run_Q = (self._quantile() * np.sqrt(spread_Q + more) for more in (0, self.variance))
        ends = (log_Q, log_Q - curve_Q, log_Q + curve_Q, log_Q - run_Q, log_Q + run_Q)
        return Estimate(*(self.error * np.exp(end) for end in ends))

    def _quantile(self) -> float:
        return float(t_distribution.ppf((1 + LEVEL) / 2, self.freedom))


def fit_scaling_law(sizes_R: np.ndarray, errors_R: np.ndarray) -> ScalingLaw:
    """The power law of runs; several runs of one size are points of their own.

    Args:
        sizes_R: parameters of each run, positive.
        errors_R: positive, in any unit.

    Raises:
        UserError: less than three different sizes.
    """
    count = len(np.unique(sizes_R))
    if count < SIZES:
        raise UserError(f"a power law needs runs of {SIZES} different sizes or more, here are {count}")
    size, error = (float(np.exp(np.log(values).mean())) for values in (sizes_R, errors_R))
    x_R, y_R = np.log(sizes_R / size), np.log(errors_R / error)
    theta_K, offset_p = _line(x_R, y_R), None
    if count >= SIZES_FOR_OFFSET:
        bent_K = _with_offset(x_R, y_R)
        offset_p = _p_of_the_last(_squares(theta_K, x_R, y_R), _squares(bent_K, x_R, y_R), len(x_R) - len(bent_K))
        slopes_RK = _law(bent_K, x_R)[1]
        told = np.linalg.cond(slopes_RK) < LARGEST_CONDITION  # else the runs do not tell offset and exponent apart
        theta_K = bent_K if told and offset_p < 1 - LEVEL else theta_K
    squares, freedom = _squares(theta_K, x_R, y_R), len(x_R) - len(theta_K)
    slopes_RK = _law(theta_K, x_R)[1]
    variance = squares / freedom
    covariance_KK = variance * np.linalg.inv(slopes_RK.T @ slopes_RK)
    r2 = 1 - squares / float(y_R @ y_R) if np.ptp(errors_R) else 0.0
    return ScalingLaw(size, error, theta_K, covariance_KK, variance, freedom, r2, offset_p)


def _law(theta_K: np.ndarray, x_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ln(c + exp(ln a − b·x)) [Q], and its derivatives by the parameters [Q, K]."""
    power_Q = np.exp(theta_K[0] - theta_K[1] * x_Q)
    value_Q = power_Q + theta_K[2:].sum()
    parts_Q3 = np.stack([power_Q, -x_Q * power_Q, np.ones_like(x_Q)], 1)
    return np.log(value_Q), parts_Q3[:, : len(theta_K)] / value_Q[:, None]


def _squares(theta_K: np.ndarray, x_R: np.ndarray, y_R: np.ndarray) -> float:
    return float(np.square(_law(theta_K, x_R)[0] - y_R).sum())


def _line(x_R: np.ndarray, y_R: np.ndarray) -> np.ndarray:
    """ln a and b of the law without an offset."""
    return np.linalg.lstsq(np.stack([np.ones_like(x_R), -x_R], 1), y_R, rcond=None)[0]


def _with_offset(x_R: np.ndarray, y_R: np.ndarray) -> np.ndarray:
    """ln a, b and c, begun at the best of some offsets and the lines through what they leave."""
    starts = []
    for c in STARTS * np.exp(y_R.min()):
        log_a, b = _line(x_R, np.log(np.exp(y_R) - c))
        starts.append(np.array([log_a, np.clip(b, 1e-3, STEEPEST / 2), c]))
    return least_squares(
        lambda theta_K: _law(theta_K, x_R)[0] - y_R,
        min(starts, key=lambda theta_K: _squares(theta_K, x_R, y_R)),
        lambda theta_K: _law(theta_K, x_R)[1],
        bounds=((-np.inf, 0, 0), (np.inf, STEEPEST, np.inf)),
        ftol=TOLERANCE,
        xtol=TOLERANCE,
        gtol=TOLERANCE,
    ).x


def _p_of_the_last(without: float, with_it: float, freedom: int) -> float:
    """p of the F test that a law's last parameter is none, from the sums of squares without and with it."""
    floor = freedom * ROUNDING**2
    return float(f_distribution.sf(freedom * (without - with_it) / (with_it + floor), 1, freedom))

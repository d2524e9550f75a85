"""The scaling law of the BigFace report, E(P) = c + a·P^(−b): error as a power of size, fitted over runs.

docs/methods/bigface.md gives the report's own figures. The fit minimises the squared residuals of ln E.

- Without the offset c the law is a straight line over ln P. Intervals use Student's t with R − 2 degrees of freedom.
  They are exact if ln E scatters normally, and equally at all sizes.
- The offset c ≥ 0 is the error that remains at any size. The law with an offset is linearised at the minimum (delta
  method, R − 3 degrees of freedom), so its intervals are approximate.
- The offset is kept if an F test of this one parameter rejects c = 0 at 5 %. The test needs four sizes or more.

All intervals are 95 % intervals and ignore the choice between both laws. If too few runs hide an offset, the exponent
and its interval are too small.

Legend: R runs, Q requested sizes, K parameters of the law: ln a, b and, with an offset, c.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import f as f_distribution
from scipy.stats import t as t_distribution

from fr_core.errors import UserError

LEVEL = 0.95
SIZES, SIZES_FOR_OFFSET = 3, 4  # least numbers of different sizes
STEEPEST = 10.0  # largest exponent of a law with an offset; above it only the smallest size would matter
STARTS = np.array([0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])  # initial offsets, as shares of the smallest error
TOLERANCE = 1e-12  # relative, of the fit with an offset
LARGEST_CONDITION = 1e6  # of the derivatives of a law with an offset
ROUNDING = 1e-10  # smaller residuals of ln E are rounding errors


@dataclass(frozen=True)
class Estimate:
    """Errors by the law at some sizes, with intervals; each array is [Q]."""

    error: np.ndarray
    curve_low: np.ndarray  # interval of the law
    curve_high: np.ndarray
    run_low: np.ndarray  # interval of one new run
    run_high: np.ndarray


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law. Its units are the runs' geometric means, so that its parameters are near 1."""

    size: float  # geometric mean of the runs' sizes
    error: float  # geometric mean of the runs' errors
    theta_K: np.ndarray  # parameters
    covariance_KK: np.ndarray  # of the parameters
    variance: float  # of ln E around the law
    freedom: int  # R − K
    r2: float  # share of ln E's variance that the law explains; 0 if all errors are equal
    offset_p: float | None  # p value of the F test of c = 0; None: too few sizes for the test

    @property
    def exponent(self) -> float:
        """Return b."""
        return float(self.theta_K[1])

    @property
    def exponent_interval(self) -> tuple[float, float]:
        """Return the 95 % interval of b."""
        half = self._quantile() * float(np.sqrt(self.covariance_KK[1, 1]))
        return self.exponent - half, self.exponent + half

    @property
    def prefactor(self) -> float:
        """Return a, in units of the runs' sizes and errors."""
        return float(self.error * np.exp(self.theta_K[0]) * self.size**self.exponent)

    @property
    def offset(self) -> float:
        """Return c, in units of the runs' errors."""
        return float(self.error * self.theta_K[2]) if len(self.theta_K) == 3 else 0.0

    def at(self, sizes_Q: np.ndarray) -> Estimate:
        """Predict errors at some sizes, with intervals of the law and of one new run."""
        log_Q, slopes_QK = _law(self.theta_K, np.log(sizes_Q / self.size))
        spread_Q = np.einsum("qk,kl,ql->q", slopes_QK, self.covariance_KK, slopes_QK)
        curve_Q, run_Q = (self._quantile() * np.sqrt(spread_Q + more) for more in (0, self.variance))
        ends = (log_Q, log_Q - curve_Q, log_Q + curve_Q, log_Q - run_Q, log_Q + run_Q)
        return Estimate(*(self.error * np.exp(end) for end in ends))

    def _quantile(self) -> float:
        """Return the quantile of Student's t for 95 % intervals."""
        return float(t_distribution.ppf((1 + LEVEL) / 2, self.freedom))


def fit_scaling_law(sizes_R: np.ndarray, errors_R: np.ndarray) -> ScalingLaw:
    """Fit the power law to runs. Several runs of one size are separate points.

    Args:
        sizes_R: Number of parameters of each run, positive.
        errors_R: Error of each run, positive, in any unit.

    Raises:
        UserError: The runs have fewer than three different sizes.
    """
    count = len(np.unique(sizes_R))
    if count < SIZES:
        raise UserError(f"a power law needs runs of {SIZES} sizes or more: add runs to the {count} sizes here")
    size, error = (float(np.exp(np.log(values).mean())) for values in (sizes_R, errors_R))
    x_R, y_R = np.log(sizes_R / size), np.log(errors_R / error)
    theta_K, offset_p = _line(x_R, y_R), None
    if count >= SIZES_FOR_OFFSET:
        offset_K = _with_offset(x_R, y_R)
        freedom = len(x_R) - len(offset_K)
        offset_p = _p_of_the_last(_squares(theta_K, x_R, y_R), _squares(offset_K, x_R, y_R), freedom)
        slopes_RK = _law(offset_K, x_R)[1]
        distinct = np.linalg.cond(slopes_RK) < LARGEST_CONDITION  # else runs cannot separate offset from exponent
        theta_K = offset_K if distinct and offset_p < 1 - LEVEL else theta_K
    squares, freedom = _squares(theta_K, x_R, y_R), len(x_R) - len(theta_K)
    slopes_RK = _law(theta_K, x_R)[1]
    variance = squares / freedom
    covariance_KK = variance * np.linalg.inv(slopes_RK.T @ slopes_RK)
    r2 = 1 - squares / float(y_R @ y_R) if np.ptp(errors_R) else 0.0
    return ScalingLaw(size, error, theta_K, covariance_KK, variance, freedom, r2, offset_p)


def _law(theta_K: np.ndarray, x_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ln(c + exp(ln a − b·x)) [Q], and its derivatives with respect to the parameters [Q, K]."""
    power_Q = np.exp(theta_K[0] - theta_K[1] * x_Q)
    value_Q = power_Q + theta_K[2:].sum()
    parts_Q3 = np.stack([power_Q, -x_Q * power_Q, np.ones_like(x_Q)], 1)
    return np.log(value_Q), parts_Q3[:, : len(theta_K)] / value_Q[:, None]


def _squares(theta_K: np.ndarray, x_R: np.ndarray, y_R: np.ndarray) -> float:
    """Return the sum of squared residuals of ln E."""
    return float(np.square(_law(theta_K, x_R)[0] - y_R).sum())


def _line(x_R: np.ndarray, y_R: np.ndarray) -> np.ndarray:
    """Fit ln a and b of the law without an offset."""
    return np.linalg.lstsq(np.stack([np.ones_like(x_R), -x_R], 1), y_R, rcond=None)[0]


def _with_offset(x_R: np.ndarray, y_R: np.ndarray) -> np.ndarray:
    """Fit ln a, b and c. The fit starts at the best of some offsets with a line through the remaining error."""
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
    """Return the p value of the F test that a law's last parameter is 0.

    Args:
        without, with_it: Sums of squared residuals without and with the parameter.
        freedom: Degrees of freedom with the parameter.
    """
    floor = freedom * ROUNDING**2
    return float(f_distribution.sf(freedom * (without - with_it) / (with_it + floor), 1, freedom))

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fr_core.errors import UserError
from fr_core.verify.scaling_law import fit_scaling_law

SIZES = np.array([24e6, 34e6, 44e6, 65e6, 119e6, 306e6])
exponents, scales = st.floats(0.05, 1.5), st.floats(1e-3, 1e3)


def scattered(errors, sigma, seed):
    return errors * np.exp(sigma * np.random.default_rng(seed).normal(size=len(errors)))


@given(exponents, scales)
def test_an_exact_law_is_found(exponent, scale):
    law = fit_scaling_law(SIZES, scale * SIZES**-exponent)
    assert (law.exponent, law.prefactor) == pytest.approx((exponent, scale), rel=1e-9)
    assert law.exponent_interval == pytest.approx((exponent, exponent), rel=1e-9)
    assert law.offset == 0
    assert law.r2 == pytest.approx(1)
    assert law.at(np.array([1e9])).error[0] == pytest.approx(scale * 1e9**-exponent, rel=1e-9)


@given(exponents, scales, st.floats(0.1, 0.9))
def test_an_exact_law_with_an_offset_is_found(exponent, scale, share):
    """The offset is a share of the largest net's error."""
    offset = share / (1 - share) * scale * SIZES[-1] ** -exponent
    law = fit_scaling_law(SIZES, offset + scale * SIZES**-exponent)
    found = law.exponent, law.prefactor, law.offset  # a small exponent looks much like an offset: six digits are lost
    assert found == pytest.approx((exponent, scale, offset), rel=1e-4)
    assert law.offset_p < 1e-6
    assert law.at(np.array([1e12])).error[0] == pytest.approx(offset + scale * 1e12**-exponent, rel=1e-4)


def test_intervals_without_an_offset_are_those_of_linear_regression():
    sizes = SIZES[[0, 0, 2, 5, 5]]
    errors = scattered(2 * sizes**-0.3, 0.1, 0)
    law = fit_scaling_law(sizes, errors)
    x, y = np.log(sizes), np.log(errors)
    line = stats.linregress(x, y)
    t = stats.t.ppf(0.975, 3)
    assert law.exponent_interval == pytest.approx((-line.slope - t * line.stderr, -line.slope + t * line.stderr))
    assert law.r2 == pytest.approx(line.rvalue**2)
    assert law.prefactor == pytest.approx(np.exp(line.intercept))
    there = np.log(6e8)
    middle = line.intercept + line.slope * there
    s = np.sqrt(np.square(y - line.intercept - line.slope * x).sum() / 3)
    leverage = 1 / 5 + (there - x.mean()) ** 2 / np.square(x - x.mean()).sum()
    estimate = law.at(np.array([6e8]))
    assert np.log(estimate.error[0]) == pytest.approx(middle)
    assert np.log(estimate.curve_high[0]) == pytest.approx(middle + t * s * np.sqrt(leverage))
    assert np.log(estimate.run_low[0]) == pytest.approx(middle - t * s * np.sqrt(1 + leverage))


@pytest.mark.parametrize(("offset", "times"), [(0.0, 1), (0.01, 3)])
def test_intervals_hold_what_they_promise(offset, times):
    """Of 150 repetitions, 95 % are 134 to 149 (binomial, 99.9 %)."""
    sizes = np.repeat(SIZES, times)
    next_error = offset + 3e4 * 6e8**-0.8
    holds = {"exponent": 0, "curve": 0, "run": 0, "choice": 0}
    for seed in range(150):
        law = fit_scaling_law(sizes, scattered(offset + 3e4 * sizes**-0.8, 0.02, seed))
        low, high = law.exponent_interval
        estimate = law.at(np.array([6e8]))
        (new,) = scattered(np.array([next_error]), 0.02, 1000 + seed)
        holds["exponent"] += low <= 0.8 <= high
        holds["curve"] += estimate.curve_low[0] <= next_error <= estimate.curve_high[0]
        holds["run"] += estimate.run_low[0] <= new <= estimate.run_high[0]
        holds["choice"] += (law.offset > 0) == (offset > 0)
    assert all(134 <= count <= 149 for name, count in holds.items() if name != "choice"), holds
    assert holds["choice"] >= 134


@given(st.integers(0, 1000), scales, scales, st.randoms())
def test_units_and_order_do_not_matter(seed, of_size, of_error, random):
    sizes = SIZES[[0, 1, 1, 4]]  # three sizes
    errors = scattered(sizes**-0.3, 0.2, seed)
    law = fit_scaling_law(sizes, errors)
    order = random.sample(range(4), 4)
    other = fit_scaling_law(of_size * sizes[order], of_error * errors[order])
    assert other.exponent == pytest.approx(law.exponent)
    assert other.exponent_interval == pytest.approx(law.exponent_interval)
    assert other.at(np.array([of_size * 1e9])).run_high == pytest.approx(of_error * law.at(np.array([1e9])).run_high)
    assert other.offset_p is law.offset_p is None


def test_errors_that_do_not_fall():
    flat = fit_scaling_law(SIZES, np.full(6, 0.1))
    assert (flat.exponent, flat.offset, flat.r2) == pytest.approx((0, 0, 0), abs=1e-12)
    assert flat.at(SIZES).error == pytest.approx(0.1)
    rising = fit_scaling_law(SIZES, 1e-5 * SIZES**0.2)
    assert (rising.exponent, rising.offset) == pytest.approx((-0.2, 0))


def test_seeds_are_no_sizes():
    with pytest.raises(UserError, match="3 sizes or more: add runs to the 2 sizes here"):
        fit_scaling_law(SIZES[[0, 0, 0, 1, 1]], np.array([0.3, 0.2, 0.3, 0.1, 0.1]))

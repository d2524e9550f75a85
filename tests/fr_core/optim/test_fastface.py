import csv
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fr_core.config.optim import FastFace, FastFaceHaar, FastFaceRecurrence
from fr_core.errors import UserError
from fr_core.optim.fastface import HaarWindow, Recurrence, RunWindow, watcher
from tests.helpers.machine import REAL_DATA, needs_real_data
from tests.helpers.ranks import run_ranks

HAAR_CHANGES = [54273, 72866, 94820, 113104, 135860, 143861, 151862, 159863, 175826, 183827, 191828, 199829]
RECURRENCE_CHANGES = [94270, 135927, 156070, 175310, 185427, 195544]


def changes(watching, losses):
    """Return (first step at the new rate, factor) of every change."""
    found = []
    for step, loss in enumerate(losses, 1):
        before = watching.factor
        watching.observe(loss)
        if watching.factor != before:
            found.append((step + 1, watching.factor / before))
    return found


@pytest.fixture(scope="module")
def published():
    losses = []
    with (REAL_DATA / "fastface" / "ms1mv3_r100.csv").open() as file:
        for row in csv.DictReader(file):
            losses += [float(row["mean_loss"])] * (int(row["last_step"]) - len(losses))
    return losses


@needs_real_data
def test_the_window_form_replays_the_published_run(published):
    found = changes(HaarWindow(FastFaceHaar(m=4000), len(published)), published)
    assert [factor for _, factor in found] == [0.5] * 7 + [4.0] + [0.5] * 3 + [4.0]
    assert np.abs(np.array([step for step, _ in found]) - HAAR_CHANGES).max() <= 3


@needs_real_data
def test_the_recurrence_replays_the_published_run(published):
    found = changes(Recurrence(FastFaceRecurrence(start="published"), 202_320, 128), published)
    assert [factor for _, factor in found] == [0.5] * 6
    assert np.abs(np.array([step for step, _ in found]) - RECURRENCE_CHANGES).max() <= 3


def detectors(watching, losses):
    found = []
    for loss in losses:
        watching.observe(float(loss))
        found.append(watching.detector)
    return np.array(found)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_consistent_start_is_an_average_of_averages(seed):
    """The reference is two plain moving averages in float64, over 200,000 steps of a random walk."""
    losses = 20 + np.random.default_rng(seed).normal(0, 0.05, 200_000).cumsum()
    falls = -np.diff(losses)
    first = second = 1e-3 * falls[0]
    expected = [0.0, second]
    for fall in falls[1:]:
        first += 1e-3 * (fall - first)
        second += 1e-3 * (first - second)
        expected.append(second)
    found = detectors(Recurrence(FastFaceRecurrence(), 200_000, 128), losses)
    assert np.abs(found - expected).max() < 1e-9


def test_the_published_start_overshoots():
    """After one fall of 0.5 and a constant loss, D is 0.184 at step 1000. With a consistent start, it stays small."""
    losses = [10.0] + [9.5] * 1000
    published, consistent = (FastFaceRecurrence(start=start) for start in ("published", "consistent"))
    assert detectors(Recurrence(published, 50_000, 128), losses)[-1] == pytest.approx(0.184, abs=5e-4)
    assert abs(detectors(Recurrence(consistent, 50_000, 128), losses)[-1]) < 1e-3


@needs_real_data
@pytest.mark.parametrize("steps", [800, 3000, 202_320])
def test_the_run_form_cuts_at_the_same_share_of_a_squeezed_run(published, steps):
    """A row of the squeezed log is the mean of as many steps of the published run."""
    each = len(published) // steps
    losses = np.array(published[: each * steps]).reshape(steps, each).mean(1)
    shares = [step / steps for step, _ in changes(RunWindow(FastFace(), steps), losses.tolist())]
    assert 0.18 < shares[0] < 0.30
    whole = changes(RunWindow(FastFace(), len(published)), published)
    assert shares == pytest.approx([step / len(published) for step, _ in whole], abs=0.01)


@pytest.mark.parametrize("w", [2, 5, 33])
def test_the_run_form_equals_recomputed_windows(w):
    losses = np.random.default_rng(w).normal(5, 1, 400) + np.linspace(9, 1, 400)
    found = detectors(RunWindow(FastFace(window=w / 400), 400), losses)
    assert (found[: 2 * w - 1] == 1).all()
    for step in range(2 * w, 401):
        older, newer = losses[step - 2 * w : step - w].mean(), losses[step - w : step].mean()
        mean_fall = (losses[:w].mean() - newer) / (step - w)
        expected = (older - newer) / w / mean_fall if mean_fall > 0 else float(older > newer)
        assert found[step - 1] == pytest.approx(expected, abs=1e-8)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_the_run_form_ignores_scale_and_offset_of_the_loss(seed, scale, offset):
    losses = 10 * np.exp(-np.arange(1000) / 200) + np.random.default_rng(seed).normal(0, 0.3, 1000)
    found = detectors(RunWindow(FastFace(), 1000), losses)
    assert detectors(RunWindow(FastFace(), 1000), scale * losses + offset) == pytest.approx(found, rel=1e-4, abs=1e-5)


def test_a_huge_loss_is_forgotten_with_its_window():
    losses = np.linspace(9, 1, 400) + np.random.default_rng(0).normal(0, 0.1, 400)
    found = detectors(RunWindow(FastFace(window=0.05), 400), losses)
    losses[100] = 1e20  # in float64, sums lose all that is below 1e4 beside it
    assert detectors(RunWindow(FastFace(window=0.05), 400), losses)[160:] == pytest.approx(found[160:], abs=1e-9)


def test_the_run_form_cuts_a_loss_that_rises_and_one_that_stays():
    for losses in ([1.0] * 200, np.linspace(1, 2, 200)):
        found = changes(RunWindow(FastFace(window=0.05, patience=0.1, max_cuts=2), 200), losses)
        assert found == [(20 + 20 + 1 + k * 21, 0.5) for k in range(2)]  # two windows of 10, then 21 steps each


@pytest.mark.parametrize("m", [2, 5, 8, 33])
def test_the_window_form_equals_recomputed_windows(m):
    losses = np.random.default_rng(m).normal(5, 1, 400)
    found = detectors(HaarWindow(FastFaceHaar(m=m), 400), losses)
    for step in range(2 * m, 401):
        means = [losses[t - m : t].mean() for t in range(step - m + 1, step + 1)]
        haar = (sum(means[: m // 2]) - sum(means[m - m // 2 :])) / m
        assert found[step - 1] == pytest.approx(haar, abs=1e-10)
    assert (found[: 2 * m - 1] == 0).all()


def test_a_constant_loss_is_cut_at_even_steps_down_to_the_floor():
    watching = Recurrence(FastFaceRecurrence(alpha=0.1, beta=0.1, patience=0.01, max_cuts=3), 1000, 128)
    found = changes(watching, [1.0] * 200)
    assert found == [(13 + 11 * k, 0.5) for k in range(3)]  # 10 stationary steps from the second on; the next one cuts
    assert watching.factor == 1 / 8


def test_a_falling_loss_is_never_cut():
    fast = FastFaceRecurrence(alpha=0.1, beta=0.1, patience=0.01)
    assert changes(Recurrence(fast, 1000, 128), np.linspace(9, 1, 1000)) == []
    assert changes(RunWindow(FastFace(patience=0.01), 1000), np.linspace(9, 1, 1000)) == []
    assert changes(HaarWindow(FastFaceHaar(m=10, threshold=0.01), 1000), np.linspace(9, 1, 1000)) == []


def test_a_constant_loss_restarts_the_window_form_each_fourth_time():
    found = changes(HaarWindow(FastFaceHaar(m=10), 1000), [1.0] * 130)
    assert [factor for _, factor in found] == [0.5, 0.5, 0.5, 4.0, 0.5]
    assert np.diff([step for step, _ in found]).tolist() == [21] * 4  # more than 2m in a row


@pytest.mark.parametrize(
    "schedule",
    [FastFace(patience=0.02, window=0.02), FastFaceRecurrence(alpha=0.1, beta=0.1, patience=0.02), FastFaceHaar(m=20)],
    ids=lambda s: s.kind,
)
@pytest.mark.parametrize("at", [1, 7, 55, 111])
def test_state_goes_on_in_the_middle_of_a_stretch(schedule, at):
    losses = 3 + 1e-6 * np.random.default_rng(0).normal(0, 1, 300)
    whole, first, second = (watcher(schedule, 1000, 128) for _ in range(3))
    expected = changes(whole, losses.tolist())
    found = changes(first, losses[:at].tolist())
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [(step + at, factor) for step, factor in changes(second, losses[at:].tolist())]
    assert found == expected
    assert len(expected) > 1
    assert second.state_dict() == whole.state_dict()


def test_a_run_that_goes_on_with_another_length_keeps_its_stretch_under_the_new_patience():
    """The run had 5 stationary steps. A cut follows after 6, 10 or 20, as T is 60, 100 or 200."""
    config = FastFaceRecurrence(alpha=0.1, beta=0.1, patience=0.1)
    first = Recurrence(config, 100, 128)
    changes(first, [1.0] * 6)
    assert (first.count, first.factor) == (5, 1.0)
    for total, cut in ((60, 9), (100, 13), (200, 23)):
        longer = Recurrence(config, total, 128)
        longer.load_state_dict(first.state_dict())
        assert [step + 6 for step, _ in changes(longer, [1.0] * 18)][:1] == [cut]
    window = HaarWindow(FastFaceHaar(window=0.1), 100)
    changes(window, [1.0] * 30)
    other = HaarWindow(FastFaceHaar(window=0.1), 500)
    other.load_state_dict(window.state_dict())
    assert other.m == 10  # the window keeps its length
    assert changes(other, [1.0] * 300) == changes(window, [1.0] * 300)


def test_batch_size_rule():
    """Twice the batch means half the steps: the loss falls twice as much per step, and averages span half as many."""
    scaled = Recurrence(FastFaceRecurrence(reference_batch=128), 10_000, 256)
    assert (scaled.alpha, scaled.beta, scaled.threshold) == (2e-3, 2e-3, 1e-4)
    with pytest.raises(UserError, match="reference_batch = 1"):
        Recurrence(FastFaceRecurrence(reference_batch=1), 10_000, 1024)


def test_runs_too_short_to_decide_are_refused():
    with pytest.raises(UserError, match=r"patience = 0.05 of 19 steps"):
        Recurrence(FastFaceRecurrence(), 19, 128)
    with pytest.raises(
        UserError,
        match=r"alpha = 0.001 averages over 1,000 steps, too many for 4,000 steps after .* raise it to 0.0013",
    ):
        Recurrence(FastFaceRecurrence(), 4000, 128)
    with pytest.raises(
        UserError, match=r"beta = 0.001 .* 40,000 steps after the warm-up with schedule.start = \"published\""
    ):
        Recurrence(FastFaceRecurrence(alpha=0.002, start="published"), 40_000, 128)
    with pytest.raises(UserError, match=r"window = 0.05 of 39 steps"):
        RunWindow(FastFace(), 39)
    with pytest.raises(UserError, match=r"patience = 0.01 of 99 steps"):
        RunWindow(FastFace(patience=0.01), 99)
    with pytest.raises(UserError, match=r"window = 0.015 of 100 steps"):
        HaarWindow(FastFaceHaar(), 100)
    with pytest.raises(UserError, match=r"schedule.m = 10 changes the rate after 40 steps .* the run has 40 steps"):
        HaarWindow(FastFaceHaar(m=10), 40)
    assert changes(HaarWindow(FastFaceHaar(m=10), 41), [1.0] * 41) == [(41, 0.5)]  # the run's last step
    with pytest.raises(UserError, match=r"schedule.window = 0.25 changes the rate after 400 steps"):
        HaarWindow(FastFaceHaar(window=0.25), 400)


def rates_of(ranks):
    """Return the rate of 2,000 steps. Losses differ between ranks, and each rank passes their mean."""
    random = np.random.default_rng(ranks.rank)
    watching = Recurrence(FastFaceRecurrence(alpha=0.01, beta=0.01, patience=0.1), 2000, 128)
    factors = []
    for loss in 5 + random.normal(0, 0.5, 2000):
        watching.observe(float(ranks.sum_(torch.tensor(loss)) / ranks.size))
        factors.append(watching.factor)
    return factors


def test_ranks_that_feed_the_same_loss_hold_the_same_rate():
    one, two = run_ranks(2, rates_of)
    assert one == two
    assert one[-1] < 1

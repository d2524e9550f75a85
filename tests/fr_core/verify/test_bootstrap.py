import numpy as np
import pytest

from fr_core.verify.bootstrap import accuracy_interval, pair_weights, tar_intervals
from fr_core.verify.pairs import Pairs, people, score_pairs, tars


def alone(count):
    return np.repeat(np.arange(count)[:, None], 2, 1)


def test_weights_count_whole_people():
    people_P2 = np.array([[0, 0], [0, 1], [1, 2], [2, 2]])
    weights = np.concatenate(list(pair_weights(people_P2, 4000)))
    drawn = weights[:, [0, 3]]  # how often people 0 and 2 were drawn
    rest = 3 - drawn.sum(1)  # three people are drawn, person 1 the other times
    assert np.array_equal(weights[:, 1], drawn[:, 0] * rest)
    assert np.array_equal(weights[:, 2], drawn[:, 1] * rest)
    assert drawn.mean(0) == pytest.approx([1, 1], abs=0.05)


def test_parts_make_no_difference_to_shape(monkeypatch):
    monkeypatch.setattr("fr_core.verify.bootstrap.PART", 50)
    parts = list(pair_weights(alone(20), 7))
    assert [part.shape for part in parts] == [(2, 20), (2, 20), (2, 20), (1, 20)]


def test_the_interval_of_independent_decisions_is_the_binomial_one():
    right = np.arange(2000) < 1800
    low, high = accuracy_interval(right, alone(2000))
    half = 1.96 * np.sqrt(0.9 * 0.1 / 2000)
    assert (low, high) == pytest.approx((0.9 - half, 0.9 + half), abs=0.002)


def test_pairs_that_share_people_are_worth_less_than_they_count():
    random = np.random.default_rng(0)
    person = np.repeat(np.arange(20), 100)
    right = np.repeat(random.random(20) < 0.8, 100)  # all pairs of a person are right or wrong together
    low, high = accuracy_interval(right, np.column_stack([person, person]))
    alone_low, alone_high = accuracy_interval(right, alone(2000))
    assert high - low > 5 * (alone_high - alone_low)


def test_tar_against_resampling_by_hand():
    random = np.random.default_rng(1)
    same = np.arange(300) % 2 == 0
    scores = np.round(random.normal(size=300) + 1.5 * same, 1)  # with ties
    ((low, high),) = tar_intervals(scores, same, alone(300), [0.1]).values()
    repeated = []
    for weights in np.concatenate(list(pair_weights(alone(300)))).astype(int):
        repeated.append(tars(np.repeat(scores, weights), np.repeat(same, weights), [0.1])[0])
    assert (low, high) == pytest.approx(tuple(np.percentile(repeated, (2.5, 97.5))))


def test_people_are_folders_where_these_agree_with_the_pairs():
    paths = ["a/1", "a/2", "b/1", "c/1"]
    pairs = Pairs(paths, np.array([0, 2]), np.array([1, 3]), np.array([True, False]), np.array([0, 1]))
    assert people(pairs).tolist() == [[0, 0], [1, 2]]
    loose = Pairs(["1", "2", "3"], np.array([0, 0]), np.array([1, 2]), np.array([True, False]), np.array([0, 1]))
    assert people(loose).tolist() == [[0, 0], [1, 1]]


def test_one_decision_kind_only_in_some_resamples():
    """Resamples without impostor pairs are left out, not counted as zero."""
    scores, same = np.array([0.9, 0.8, 0.7, 0.1]), np.array([True, True, False, False])
    people_P2 = np.array([[0, 0], [1, 1], [0, 1], [2, 3]])
    (interval,) = tar_intervals(scores, same, people_P2, [0.5]).values()
    assert np.isfinite(interval).all()


def test_the_protocol_gives_intervals_around_its_figures():
    random = np.random.default_rng(0)
    same = np.arange(6000) % 2 == 0
    both = random.integers(0, 50, 6000)
    paths = [f"p{i // 100}/{i % 100}" for i in range(5000)]
    left, right = both * 100, np.where(same, both * 100 + 1, (both + 1) % 50 * 100)
    pairs = Pairs(paths, left, right, same, np.arange(6000) % 10)
    result = score_pairs(random.normal(size=6000) + 2 * same, pairs)
    assert result.accuracy_interval[0] < result.accuracy < result.accuracy_interval[1]
    assert result.tar_at_far.keys() == result.tar_intervals.keys()
    assert all(low <= result.tar_at_far[far] <= high for far, (low, high) in result.tar_intervals.items())

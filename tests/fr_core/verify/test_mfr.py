import numpy as np
import pytest
from sklearn.metrics import roc_curve

from fr_core.errors import UserError
from fr_core.verify.mfr import NonMatches, nonmatches, score


def faces(count, people, seed, noise=0.3):
    random = np.random.default_rng(seed)
    directions = np.random.default_rng(0).normal(size=(people, 16))
    who = random.integers(0, people, count)
    vectors = directions[who] / 4 + noise * random.normal(size=(count, 16))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), who


def expected(scores, same, fmr):
    false, true, _ = roc_curve(same, scores, drop_intermediate=False)
    return 1 - true[false <= fmr].max()


@pytest.mark.parametrize("block", [7, 1024])
def test_fnmr_is_that_of_all_pairs(monkeypatch, block):
    monkeypatch.setattr("fr_core.verify.mfr.BLOCK", block)
    probes, people = faces(150, 12, 1)
    gallery, owners = faces(90, 12, 2)
    alone, both = nonmatches(probes, people), nonmatches(probes, people, gallery, owners)
    upper = np.triu_indices(150, 1)
    cases = [
        (alone, (probes @ probes.T)[upper], (people[:, None] == people)[upper]),
        (both, (probes @ gallery.T).ravel(), (people[:, None] == owners).ravel()),
    ]
    for found, scores, same in cases:
        assert (found.genuine, found.impostors) == (same.sum(), (~same).sum())
        assert set(found.fnmr) == {1e-3, 1e-4}  # some ten thousand pairs cannot measure a smaller FMR
        for fmr, fnmr in found.fnmr.items():
            assert fnmr == pytest.approx(expected(scores, same, fmr))
            assert 0 < fnmr < 1


def test_ties_with_an_impostor_do_not_match():
    probes = np.tile(np.array([[1.0, 0.0]], np.float32), (60, 1))
    assert nonmatches(probes, np.arange(60) // 2).fnmr[1e-3] == 1


def test_one_kind_of_pairs_or_no_numbers_are_refused():
    probes, people = faces(10, 3, 1)
    for wrong in (np.zeros(10, int), np.arange(10)):
        with pytest.raises(UserError, match="both pairs of one person and pairs of two"):
            nonmatches(probes, wrong)
    with pytest.raises(UserError, match="not finite"):
        nonmatches(probes * np.nan, people)


def test_the_score_weighs_masked_and_standard():
    masked, standard = NonMatches({1e-5: 0.4}, 1, 1), NonMatches({1e-5: 0.2}, 1, 1)
    assert score({"masked": masked, "standard": standard}) == pytest.approx(0.25)
    assert score({"masked": NonMatches({}, 1, 1), "standard": standard}) is None

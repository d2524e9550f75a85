import numpy as np
import pytest

from fr_core.errors import UserError
from fr_core.verify import templates
from fr_core.verify.templates import identify, pair_cosines, pooled


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def people(random, count, dims=16):
    return unit(random.normal(size=(count, dims))).astype(np.float32)


def test_pooling_against_the_definition():
    random = np.random.default_rng(0)
    features = random.normal(size=(200, 8)).astype(np.float32)
    template, medium, weight = random.integers(5, 25, 200), random.integers(0, 6, 200), random.random(200)
    numbers, found = pooled(features, template, medium, weight)
    assert numbers.tolist() == sorted(set(template.tolist()))
    for number, feature in zip(numbers, found, strict=True):
        total = np.zeros(8)
        for m in set(medium[template == number].tolist()):
            chosen = (template == number) & (medium == m)
            total += (features[chosen].astype(np.float64) * weight[chosen, None]).mean(0)
        assert np.allclose(feature, unit(total), atol=1e-5)


def test_without_media_and_weights_it_is_the_mean():
    random = np.random.default_rng(1)
    features, template = random.normal(size=(30, 8)).astype(np.float32), np.arange(30) % 4
    _, found = pooled(features, template)
    expected = np.stack([unit(features[template == t].mean(0)) for t in range(4)])
    assert np.allclose(found, expected, atol=1e-5)


def test_a_template_of_zeros_is_no_error():
    _, found = pooled(np.zeros((2, 4), np.float32), np.array([1, 1]))
    assert np.array_equal(found, np.zeros((1, 4)))


def test_cosines_of_pairs_in_parts(monkeypatch):
    monkeypatch.setattr(templates, "BLOCK", 7)
    random = np.random.default_rng(2)
    features, left, right = people(random, 20), random.integers(0, 20, 50), random.integers(0, 20, 50)
    expected = (features @ features.T)[left, right]
    assert np.allclose(pair_cosines(features, left, right), expected, atol=1e-6)


def test_a_search_worked_by_hand():
    gallery = unit(np.array([[1, 0], [0, 1], [-1, 0], [1, 0.1]], float)).astype(np.float32)
    names = np.array([7, 8, 9, 7])  # person 7 has two templates
    probes = unit(np.array([[1, 0.1], [1, 0.9], [-1, 0.2], [0, -1]], float)).astype(np.float32)
    result = identify(gallery, names, probes, np.array([7, 8, 9, 5]))
    assert (result.mated, result.unmated) == (3, 1)
    assert result.at_rank == {1: pytest.approx(2 / 3)}  # the second probe, of person 8, is nearer to person 7
    assert result.tpir_at_fpir == {}  # one unmated probe cannot measure a rate of 0.1


@pytest.mark.parametrize("block", [7, 512])
def test_searches_against_a_plain_loop(monkeypatch, block):
    monkeypatch.setattr(templates, "BLOCK", block)
    random = np.random.default_rng(3)
    centres = people(random, 60)
    who_g = np.concatenate([np.arange(40), random.integers(0, 40, 15)])
    who_p = random.integers(0, 60, 300)
    gallery = unit(centres[who_g] + 0.25 * random.normal(size=(55, 16))).astype(np.float32)
    probes = unit(centres[who_p] + 0.25 * random.normal(size=(300, 16))).astype(np.float32)
    result = identify(gallery, who_g, probes, who_p)
    ranks, own, strangers = [], [], []
    for probe, person in zip(probes, who_p, strict=True):
        best = {who: max(float(probe @ g) for g in gallery[who_g == who]) for who in range(40)}
        if person >= 40:
            strangers.append(max(best.values()))
        else:
            ranks.append(sum(score >= best[person] for score in best.values()))
            own.append(best[person])
    ranks, own, strangers = np.array(ranks), np.array(own), np.array(strangers)
    assert (result.mated, result.unmated) == (len(ranks), len(strangers))
    assert result.at_rank == {k: pytest.approx((ranks <= k).mean()) for k in (1, 5, 10)}
    for fpir in (1e-1,):
        reached = [t for t in strangers if (strangers >= t).mean() <= fpir]
        refused = max(t for t in strangers if t not in reached)
        assert result.tpir_at_fpir[fpir] == pytest.approx(((ranks == 1) & (own > refused)).mean())


def test_ties_count_against_the_probe():
    same = np.ones((3, 2), np.float32) / np.sqrt(2).astype(np.float32)
    result = identify(same, np.array([0, 1, 2]), same[:1], np.array([1]))
    assert result.at_rank == {1: 0.0}


def test_a_gallery_without_the_probes_people_is_refused():
    features = np.eye(2, dtype=np.float32)
    for names in (np.array([1, 2]), np.array([], int)):
        with pytest.raises(UserError, match="no probe's person is in the gallery"):
            identify(features[: len(names)], names, features, np.array([3, 4]))

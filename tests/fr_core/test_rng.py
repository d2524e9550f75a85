import numpy as np

from fr_core import rng


def test_uniforms_of_a_sample_do_not_depend_on_its_batch():
    ids = np.array([5, 2**40, 7, 0])
    together = rng.uniforms(3, "augment", 2, ids, 8)
    alone = np.concatenate([rng.uniforms(3, "augment", 2, ids[i : i + 1], 8) for i in range(4)])
    assert np.array_equal(together, alone)


def test_uniforms_differ_by_seed_purpose_and_epoch():
    ids = np.arange(100)
    variants = [rng.uniforms(*key, ids, 4) for key in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))]
    for i, one in enumerate(variants):
        for other in variants[:i]:
            assert not (one == other).any()


def test_uniforms_are_uniform_and_uncorrelated():
    draws = rng.uniforms(0, "augment", 0, np.arange(20_000), 6)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.stack([np.histogram(column, 20, (0, 1))[0] for column in draws.T])
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)  # five standard deviations
    assert np.abs(np.corrcoef(draws.T) - np.eye(6)).max() < 0.03
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.03  # neighbouring ids


def test_normals_are_normal_and_those_of_a_sample_do_not_depend_on_its_batch():
    draws = rng.normals(0, "margin", 3, np.arange(20_000))
    assert np.array_equal(draws[7:9], rng.normals(0, "margin", 3, np.array([7, 8])))
    assert abs(draws.mean()) < 5 / np.sqrt(20_000)  # five standard errors of each moment: variances 1, 2 and 96
    assert abs((draws**2).mean() - 1) < 5 * np.sqrt(2 / 20_000)
    assert abs((draws**4).mean() - 3) < 5 * np.sqrt(96 / 20_000)


def test_generators_repeat():
    assert rng.generator(1, "x", 2).random() == rng.generator(1, "x", 2).random()
    assert rng.generator(1, "x", 2).random() != rng.generator(1, "x", 3).random()

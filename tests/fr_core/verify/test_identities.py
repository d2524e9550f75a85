import numpy as np
import pytest

from fr_core.verify.identities import centres, copies, nearest_centres


def people(counts, noise=0.1, dimension=32, seed=0):
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    directions = random.normal(size=(len(counts), dimension))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    embeddings = directions[labels] + noise * random.normal(size=(len(labels), dimension))
    return (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float32), labels


def naive_own(embeddings, labels, kept):
    own = np.full(len(labels), np.nan)
    for i, label in enumerate(labels):
        others = kept & (labels == label)
        others[i] = False
        if others.any():
            mean = embeddings[others].astype(float).sum(0)
            own[i] = embeddings[i] @ mean / np.linalg.norm(mean)
    return own


def test_centres_and_own_cosines_are_those_written_out():
    embeddings, labels = people([1, 2, 7, 30])
    found, own = centres(embeddings, labels, -1)
    assert np.allclose(own, naive_own(embeddings, labels, np.ones(len(labels), bool)), atol=1e-5, equal_nan=True)
    assert np.isnan(own[0])
    for label in range(4):
        mean = embeddings[labels == label].sum(0)
        assert np.allclose(found[label], mean / np.linalg.norm(mean), atol=1e-6)


def test_strangers_are_trimmed_and_judged_against_the_rest():
    embeddings, labels = people([8, 8])
    embeddings[[0, 1]] = -embeddings[[0, 1]]
    found, own = centres(embeddings, labels, 0.2)
    kept = np.ones(16, bool)
    kept[[0, 1]] = False
    assert np.allclose(own, naive_own(embeddings, labels, kept), atol=1e-5)
    mean = embeddings[2:8].sum(0)
    assert np.allclose(found[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_an_identity_of_strangers_keeps_a_centre():
    embeddings = np.eye(4, dtype=np.float32)
    found, own = centres(embeddings, np.array([3, 3, 5, 5]), 0.2)
    assert np.allclose(np.linalg.norm(found, axis=1), 1)
    assert np.allclose(own, 0)


@pytest.mark.parametrize("block", [3, 4096])
def test_nearest_centres_leave_the_own_out(monkeypatch, block):
    monkeypatch.setattr("fr_core.verify.identities.BLOCK", block)
    embeddings, labels = people([5, 5, 5])
    means, _ = centres(embeddings, labels, -1)
    own = labels.copy()
    own[:2] = -1  # no identity
    who, cosine = (np.concatenate(parts) for parts in zip(*nearest_centres(embeddings, means, own), strict=True))
    table = embeddings @ means.T
    table[np.arange(2, 15), labels[2:]] = -9
    assert np.array_equal(who, table.argmax(1))
    assert np.allclose(cosine, table.max(1), atol=1e-6)
    ((none, low),) = nearest_centres(embeddings[:2], means[:1], np.zeros(2, int))
    assert none.tolist() == low.tolist() == [-1, -1]


def test_copies_name_the_first_like_them_within_their_identity():
    embeddings, labels = people([4, 3], noise=0.3)
    embeddings[2] = embeddings[3] = embeddings[0]
    embeddings[5] = embeddings[1]  # an image of another identity
    usable = np.ones(7, bool)
    assert copies(embeddings, labels, 0.999, usable).tolist() == [-1, -1, 0, 0, -1, -1, -1]
    usable[0] = False  # an unusable image is no original
    assert copies(embeddings, labels, 0.999, usable).tolist() == [-1, -1, -1, 2, -1, -1, -1]


def test_a_slow_film_keeps_some_frames():
    angles = np.deg2rad(np.arange(0, 90, 2))
    frames = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    found = copies(frames, np.zeros(len(frames), int), np.cos(np.deg2rad(9)), np.ones(len(frames), bool))
    originals = np.flatnonzero(found == -1)
    assert originals.tolist() == list(range(0, 45, 5))
    assert (frames * frames[np.where(found < 0, np.arange(45), found)]).sum(1).min() > np.cos(np.deg2rad(9.1))

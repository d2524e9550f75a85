from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fr_core.data.decode import resized
from fr_core.errors import UserError
from fr_core.verify.baselines import colour_histogram, raw_pixels
from fr_core.verify.pairs import (
    Pairs,
    best_threshold,
    make_pairs,
    odd_pairs,
    read_crops,
    read_images,
    score_pairs,
    tars,
    verify_embeddings,
)

SCORES = st.lists(st.integers(-5, 5).map(lambda n: n / 5), min_size=2, max_size=40)


def pairs_of(same, fold):
    index = np.arange(len(same))
    return Pairs([str(i) for i in index], index, index, np.array(same, bool), np.array(fold))


@given(st.data())
def test_best_threshold_and_rates_equal_brute_force_with_ties(data):
    scores = np.array(data.draw(SCORES))
    same = np.array(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    cuts = np.concatenate([np.unique(scores), [np.inf]])
    best = max(((scores >= cut) == same).mean() for cut in cuts)
    assert ((scores >= best_threshold(scores, same)) == same).mean() == best
    limits = (0.0, 0.1, 0.5, 1.0)
    if same.all() or not same.any():
        assert np.isnan(tars(scores, same, limits)).all()
        return
    rates = [((scores[~same] >= cut).mean(), (scores[same] >= cut).mean()) for cut in cuts]
    for limit, found in zip(limits, tars(scores, same, limits), strict=True):
        assert found == pytest.approx(max(tar for far, tar in rates if far <= limit))


def test_rates_equal_scikit_learns():
    from sklearn.metrics import roc_curve

    random = np.random.default_rng(4)
    same = random.random(5000) < 0.3
    scores = np.round(random.normal(size=5000) + same, 2)
    far, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    limits = np.array([1e-3, 1e-2, 0.05, 0.29, 0.9])
    expected = [tar[far <= limit].max() for limit in limits]
    assert tars(scores, same, limits) == pytest.approx(expected)


def test_each_fold_is_judged_at_the_threshold_of_the_others():
    """Scores of fold 0 are .5 higher, so the threshold 0.25 of the other folds accepts all its pairs."""
    same = [True, True, False, False] * 3
    scores = np.array([1.0, 1.0, 0.5, 0.5] + [0.5, 0.5, 0.0, 0.0] * 2)
    result = score_pairs(scores, pairs_of(same, [0] * 4 + [1] * 4 + [2] * 4))
    assert result.accuracy == pytest.approx((0.5 + 1 + 1) / 3)
    assert result.accuracy_std == pytest.approx(np.std([0.5, 1, 1]))
    assert result.tar_at_far == {}


def test_tar_is_given_only_for_rates_that_the_impostors_resolve():
    random = np.random.default_rng(0)
    same = np.arange(400) < 200
    result = score_pairs(random.random(400) + same, pairs_of(same, np.arange(400) % 10))
    assert list(result.tar_at_far) == [1e-1, 1e-2]
    assert result.tar_at_far[1e-2] == 1.0
    assert result.pairs == 400


@pytest.mark.parametrize(
    ("scores", "same", "fold", "message"),
    [
        ([1, 2, 3], [1, 1, 1], [0, 1, 2], "all 3 pairs are of one person, but .* both: add pairs of two people"),
        ([1, 2, 3], [0, 0, 0], [0, 1, 2], "all 3 pairs are of two people, but .* both: add pairs of one person"),
        ([1, 2, 3], [1, 0, 1], [0, 0, 0], "two folds"),
        ([1, np.nan, 3], [1, 0, 1], [0, 1, 2], "not finite"),
    ],
)
def test_what_cannot_be_scored_is_refused(scores, same, fold, message):
    with pytest.raises(UserError, match=message):
        score_pairs(np.array(scores, float), pairs_of(same, fold))


def test_pairs_that_a_good_list_does_not_have_are_counted():
    left, right = np.array([0, 1, 0, 2, 2, 3]), np.array([1, 0, 1, 3, 2, 2])
    pairs = Pairs(list("abcd"), left, right, np.array([1, 1, 0, 0, 1, 1], bool), np.zeros(6, int))
    assert odd_pairs(pairs) == {
        "pairs that repeat others": 3,
        "pairs called both same and different": 2,
        "pairs of an image with itself": 1,
    }
    assert odd_pairs(pairs.keep(np.array([False, False, True, False]))) == {"pairs of an image with itself": 1}


def test_missing_and_broken_images_are_named_and_their_pairs_left_out(photos, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no")
    paths = [
        "person0/0.jpg",
        "person0/1.jpg",
        "absent.jpg",
        str(tmp_path / "broken.jpg"),
        "person1/0.jpg",
        "person1/1.jpg",
    ]
    left, right = np.array([0, 0, 2, 4, 1, 3]), np.array([1, 4, 0, 5, 5, 4])
    pairs = Pairs(paths, left, right, np.array([1, 0, 1, 1, 0, 0], bool), np.array([0, 0, 0, 1, 1, 1]))
    images, failed, odd = read_images(photos, pairs, 64)
    assert images.shape == (6, 64, 64, 3)
    assert odd == []
    assert failed == {"absent.jpg": "missing", paths[3]: "corrupt or truncated"}
    result, scores, usable = verify_embeddings(raw_pixels(images), failed, pairs)
    assert (result.pairs, len(scores)) == (4, 4)
    assert usable.same.tolist() == [True, False, True, False]
    assert result.accuracy == 1.0
    with pytest.raises(UserError, match="none of the 6 pairs"):
        verify_embeddings(raw_pixels(images), dict.fromkeys(paths, "missing"), pairs)
    one_whole = replace(pairs, fold=np.array([0, 0, 1, 0, 0, 1]))  # of fold 1 each pair lacks an image
    with pytest.raises(UserError, match=r"4 of 6 pairs have both images, all of one fold; absent.jpg is missing"):
        verify_embeddings(raw_pixels(images), failed, one_whole)


def test_images_are_resized_once_straight_to_the_net(tmp_path):
    """Images of the net's size keep their pixels. Images that are not square are cropped to the centre and listed."""
    random = np.random.default_rng(0)
    small, wide = (random.integers(0, 255, (64, width, 3), np.uint8) for width in (64, 100))
    for name, image in (("small.png", small), ("wide.png", wide)):
        cv2.imwrite(str(tmp_path / name), image[:, :, ::-1])
    images, failed, odd = read_crops(tmp_path, ["small.png", "wide.png"], 64)
    assert np.array_equal(images, [small, wide[:, 18:82]])
    assert (failed, odd) == ({}, ["wide.png"])
    images, _, _ = read_crops(tmp_path, ["small.png"], 32)
    assert np.array_equal(images[0], cv2.resize(small, (32, 32), interpolation=cv2.INTER_AREA))
    images, _, _ = read_crops(tmp_path, ["small.png"], 48)
    assert np.array_equal(images[0], resized(small, 48))


def test_folds_of_made_pairs_share_no_identity():
    labels = np.repeat(np.arange(40), 5)
    left, right, same, fold = make_pairs(labels, 30, seed=1)
    assert len(left) == 600
    assert same.sum() == 300
    assert np.array_equal(labels[left] == labels[right], same)
    assert (left != right).all()
    of_fold = [set(labels[left[fold == f]]) | set(labels[right[fold == f]]) for f in range(10)]
    assert sum(map(len, of_fold)) == len(set().union(*of_fold))
    with pytest.raises(UserError, match="too few"):
        make_pairs(np.repeat(np.arange(12), 5), 30, seed=1)


def test_floors_are_what_they_say():
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (2, 16, 16, 3), np.uint8)
    shuffled = images.reshape(2, 256, 3)[:, random.permutation(256)].reshape(images.shape)
    histogram = colour_histogram(np.concatenate([images, shuffled]))
    assert np.allclose(histogram[:2], histogram[2:])  # positions do not matter
    brighter = np.clip(images.astype(int) // 2 + 30, 0, 255).astype(np.uint8)
    pixels = raw_pixels(np.concatenate([images, brighter]))
    assert (pixels[:2] * pixels[2:]).sum(1).min() > 0.99  # brightness and contrast do not matter
    assert abs(float(pixels[0] @ pixels[1])) < 0.3

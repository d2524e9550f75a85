from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fr_core.config.sections import Augment
from fr_core.data.crops import encode
from fr_core.data.decode import augment_draws, begin_batch, decode, resized
from fr_core.data.photos import RejectedImage

OFF = Augment(flip=0)


@pytest.fixture(scope="module")
def faces():
    random = np.random.default_rng(0)
    smooth = random.integers(0, 255, (40, 8, 8, 3)).astype(np.uint8)
    return [encode(np.kron(image, np.ones((14, 14, 1), np.uint8))) for image in smooth]


def batch(faces, augment, epoch=0, ids=None, size=64):
    ids = np.arange(len(faces)) if ids is None else ids
    with ThreadPoolExecutor(2) as pool:
        return begin_batch(faces, augment_draws(7, epoch, ids), size, augment, pool)()


def test_without_augmentation_a_batch_is_the_resized_images(faces):
    assert np.array_equal(batch(faces, OFF), np.stack([resized(decode(face), 64) for face in faces]))
    assert np.array_equal(batch(faces, OFF, size=112), np.stack([decode(face) for face in faces]))


@pytest.mark.parametrize("augment", [OFF, Augment(flip=0, shift=0.1)], ids=["still", "moved"])
@pytest.mark.parametrize("size", [32, 48, 64])
def test_a_fine_pattern_becomes_grey_and_no_coarser_pattern(augment, size):
    """Bilinear shrinking alone turns lines of one pixel into stripes: their deviation is 63 and more at these sizes."""
    lines = np.zeros((112, 112, 3), np.uint8)
    lines[:, ::2] = 255
    inner = batch([lines], augment, size=size)[0, 8:-8, 8:-8].astype(float)
    assert inner.std() < 20
    assert abs(inner.mean() - 127.5) < 4


def test_flip_is_exact_and_about_half(faces):
    plain, flipped = batch(faces, OFF, size=112), batch(faces, Augment(flip=0.5), size=112)
    turned = [np.array_equal(b, a[:, ::-1]) for a, b in zip(plain, flipped, strict=True)]
    same = [np.array_equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert all(t != s for t, s in zip(turned, same, strict=True))
    assert 10 <= sum(turned) <= 30
    assert np.array_equal(batch(faces, Augment(flip=1), size=64), batch(faces, OFF, size=64)[:, :, ::-1])


FULL = Augment(shift=0.1, scale=0.2, rotate=20, light=0.4, colour=0.2, grey=0.3, blur=0.3, erase=0.5)


def test_an_image_depends_on_seed_epoch_and_id_only(faces):
    whole = batch(faces, FULL)
    order = np.random.default_rng(1).permutation(len(faces))
    assert np.array_equal(batch([faces[i] for i in order], FULL, ids=order), whole[order])
    assert np.array_equal(batch(faces[3:4], FULL, ids=np.array([3])), whole[3:4])
    assert not np.array_equal(batch(faces, FULL, epoch=1), whole)


@pytest.mark.parametrize(
    "knob",
    [
        {"shift": 0.1},
        {"scale": 0.2},
        {"rotate": 15},
        {"light": 0.3},
        {"colour": 0.3},
        {"grey": 1},
        {"blur": 1},
        {"erase": 1},
    ],
)
def test_each_knob_changes_images_and_keeps_them_faces(faces, knob):
    plain, changed = batch(faces, OFF), batch(faces, OFF.model_copy(update=knob))
    differs = [not np.array_equal(a, b) for a, b in zip(plain, changed, strict=True)]
    assert np.mean(differs) > 0.9
    correlation = np.corrcoef(plain.ravel().astype(float), changed.ravel().astype(float))[0, 1]
    assert 0.3 < correlation < 0.999


def test_light_changes_contrast_about_the_mean_then_brightness_and_gains(faces):
    augment = OFF.model_copy(update={"light": 0.4, "colour": 0.2})
    plain, lit = batch(faces, OFF).astype(float), batch(faces, augment)
    for before, after, u in zip(plain, lit, augment_draws(7, 0, np.arange(len(faces))), strict=True):
        brightness, contrast, *gains = 2 * u[6:11] - 1
        changed = (before - before.mean()) * (1 + 0.4 * contrast) + before.mean()
        changed = changed * (1 + 0.4 * brightness) * (1 + 0.2 * np.array(gains))
        assert np.abs(changed.clip(0, 255) - after - 0.5).max() < 0.5 + 1e-9  # rounded down


def test_an_image_that_no_thread_can_decode_fails_the_batch(faces):
    with pytest.raises(RejectedImage):
        batch([*faces, b"not an image"], OFF)


def test_grey_has_no_colour_and_erase_stays_within_its_area(faces):
    grey = batch(faces, OFF.model_copy(update={"grey": 1})).astype(int)
    assert np.abs(grey[..., 0] - grey[..., 1]).max() == 0
    plain, erased = batch(faces, OFF), batch(faces, OFF.model_copy(update={"erase": 1, "erase_area": 0.2}))
    covered = (plain != erased).any(3).mean((1, 2))
    assert 0.02 < covered.mean() < 0.15
    assert covered.max() <= 0.22


def test_the_short_way_of_a_lone_flip_equals_the_warp(faces):
    """A zoom too small to matter goes through the warp."""
    warp = Augment(flip=0.5, scale=1e-12)
    assert np.array_equal(batch(faces, Augment(flip=0.5), size=112), batch(faces, warp, size=112))


def test_a_field_displaces_and_nothing_is_no_displacement(faces):
    still, augment = np.zeros((40, 28, 28, 2), np.float32), Augment(rotate=20, shift=0.1, scale=0.2)
    numbers = augment_draws(7, 0, np.arange(40))
    with ThreadPoolExecutor(2) as pool:
        plain = begin_batch(faces, numbers, 64, augment, pool)()
        assert np.abs(begin_batch(faces, numbers, 64, augment, pool, still)().astype(int) - plain).max() <= 1
        right = still + np.float32([10 / 112, 0])  # the source lies ten pixels to the right
        moved = begin_batch(faces, numbers, 112, OFF, pool, right)()
    assert np.array_equal(moved[:, :, :100], np.stack([decode(face) for face in faces])[:, :, 10:110])

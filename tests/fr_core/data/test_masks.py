import math

import cv2
import numpy as np
import pytest

from fr_core.config import Config
from fr_core.config.sections import Masks
from fr_core.data import masks
from fr_core.data.crops import TEMPLATE
from fr_core.data.landmarks import read_landmarks
from fr_core.data.masks import DRAWS, class_image_mask_draws, locate, mask_draws, mask_functions, masked, textures
from tests.helpers.machine import REAL_DATA, needs_real_data

YS, XS = np.mgrid[:112, :112]
TOOLS = {"warped": Masks(rendered=0), "rendered": Masks(rendered=1)}


def faces(count, seed=0):
    """Smooth images, and points as aligned crops have them: turned heads shift the nose most."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        coarse = random.integers(0, 255, (7, 7, 3)).astype(np.uint8)
        image = cv2.resize(coarse, (112, 112), interpolation=cv2.INTER_CUBIC)
        points = TEMPLATE + random.normal(0, 1.5, (5, 2))
        points[2] += random.normal(0, 5, 2)
        yield image, points.astype(np.float32), random.random(DRAWS)


def changed(before, after):
    return (before != after).any(2)


@pytest.mark.parametrize("tool", TOOLS)
def test_masks_cover_the_lower_face_and_no_eye(tool):
    """Here and below 10,000 samples in all."""
    for image, points, u in faces(2500):
        covers_the_lower_face(image, points, u, TOOLS[tool])


@needs_real_data
@pytest.mark.parametrize("tool", TOOLS)
def test_masks_cover_the_lower_face_and_no_eye_of_real_landmarks(tool):
    table = list(read_landmarks(REAL_DATA / "faces" / "landmarks.csv").values())
    random = np.random.default_rng(1)
    for (image, _, u), i in zip(faces(2500), random.permutation(len(table)), strict=False):
        covers_the_lower_face(image, table[i], u, TOOLS[tool])


def covers_the_lower_face(image, points, u, masks):
    touched = changed(image, masked(image, points, u, masks))
    points = locate(points, 112).points.astype(float)  # the template's where these are no face's
    x, y = points[1] - points[0]
    apart = math.hypot(x, y)
    for eye in points[:2]:  # no pixel of the eye itself
        dx, dy = XS - eye[0], YS - eye[1]
        assert not (touched & (dx * dx + dy * dy < 5**2)).any()
    below = ((YS - points[0, 1]) * x - (XS - points[0, 0]) * y) / apart
    assert not (touched & (below < 4)).any()
    left, top = points[3:].mean(0).astype(int)
    assert touched[max(top - 2, 0) : top + 3, max(left - 2, 0) : left + 3].mean() > 0.85
    assert 0.1 < touched.mean() < 0.6


@pytest.mark.parametrize("tool", TOOLS)
def test_a_mask_is_a_function_of_its_numbers(tool):
    (image, points, u), (_, _, other) = faces(2)
    first = masked(image, points, u, TOOLS[tool])
    kept = image.copy()
    assert np.array_equal(masked(image, points, u, TOOLS[tool]), first)
    assert np.array_equal(image, kept)
    assert not np.array_equal(masked(image, points, other, TOOLS[tool]), first)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    "points",
    [None, TEMPLATE * np.nan, TEMPLATE * 0, TEMPLATE + 5000, TEMPLATE * (-1, 1), TEMPLATE * (0.05, 1) + (50, 0)],
    ids=["none", "nan", "one point", "far off", "mirrored", "in profile"],
)
def test_points_that_no_face_has_are_taken_for_the_templates(tool, points):
    image, _, u = next(faces(1))
    expected = masked(image, TEMPLATE, u, TOOLS[tool])
    assert np.array_equal(masked(image, points, u, TOOLS[tool]), expected)


def test_faces_are_located_by_least_squares_and_together_as_alone():
    """The similarity is rounded to float32: 4e-6 pixels of 112, which its inverse enlarges little."""
    points = np.stack([points for _, points, _ in faces(50)])
    points[3], points[7] = np.nan, TEMPLATE * (-1, 1)  # those take the template's
    for i, face in enumerate(masks.locate_all(points, 112)):
        x, y = (TEMPLATE if i in (3, 7) else points[i]).astype(float).T
        one, none = np.ones(5), np.zeros(5)
        system = np.concatenate([np.stack([x, -y, one, none], 1), np.stack([y, x, none, one], 1)])
        (a, b, c, d), *_ = np.linalg.lstsq(system, TEMPLATE.T.ravel().astype(float), rcond=None)
        back = np.linalg.inv([[a, -b, c], [b, a, d], [0, 0, 1]])[:2]
        alone = locate(points[i], 112)
        assert np.allclose(face.to_image, back, atol=1e-4)
        assert np.allclose(face.to_image, alone.to_image, atol=1e-4)
        assert (face.yaw, face.pitch) == pytest.approx((alone.yaw, alone.pitch), abs=1e-4)


def test_a_rendered_mask_is_that_of_the_whole_template(monkeypatch):
    """Only the surroundings of a mask are rendered; with more room the pixels are the same."""
    worn = [masked(*face, TOOLS["rendered"]) for face in faces(100)]
    rendered = masks._view.__wrapped__
    monkeypatch.setattr(masks, "ROOM", 112)
    monkeypatch.setattr(masks, "_view", rendered)
    assert all(
        np.array_equal(masked(*face, TOOLS["rendered"]), own) for face, own in zip(faces(100), worn, strict=True)
    )


def test_a_turned_face_has_a_turned_mask():
    right = TEMPLATE.copy()
    right[2, 0] += 12
    assert locate(TEMPLATE, 112).yaw == pytest.approx(0, abs=0.02)
    assert 0.3 < locate(right, 112).yaw < 0.8
    grey = np.full((112, 112, 3), 128, np.uint8)
    for tool in TOOLS.values():
        u = np.full(DRAWS, 0.5)
        u[15] = 0.95  # no straps
        columns = [np.flatnonzero(changed(grey, masked(grey, p, u, tool)).any(0)).mean() for p in (TEMPLATE, right)]
        assert columns[1] < columns[0] - 2  # the near cheek shows more of it


@pytest.mark.parametrize("tool", TOOLS)
def test_masks_on_grey_photos_are_grey_and_on_dark_ones_dark(tool):
    for image, points, u in faces(20):
        grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        out = masked(grey, points, u, TOOLS[tool]).astype(int)
        assert np.abs(out - out.mean(2, keepdims=True)).max() <= 2
        dark = masked((image * 0.15).astype(np.uint8), points, u, TOOLS[tool])
        assert dark[60:].mean() < 100


def test_kinds_come_in_their_shares_and_of_any_size():
    image, points, _ = next(faces(1))
    numbers = np.random.default_rng(0).random((40, DRAWS))
    only = Masks(rendered=0, surgical=0, kn95=0, cloth=0, dark=1)
    white = np.full((112, 112, 3), 230, np.uint8)
    assert all(masked(white, points, u, only)[85:95, 50:60].mean() < 110 for u in numbers)
    big = cv2.resize(image, (224, 224))
    small = masked(image, points, numbers[0], TOOLS["rendered"])
    large = cv2.resize(
        masked(big, points * 2 + 0.5, numbers[0], TOOLS["rendered"]), (112, 112), interpolation=cv2.INTER_AREA
    )
    assert np.abs(small.astype(int) - large).mean() < 6
    assert {kind: len(drawn) for kind, drawn in textures(0).items()} == dict.fromkeys(textures(0), 16)


def test_draws_are_functions_of_the_sample():
    numbers = mask_draws(3, 1, np.arange(20_000))
    assert np.array_equal(mask_draws(3, 1, np.array([7]))[0], numbers[7])
    assert numbers.shape == (20_000, 1 + DRAWS)
    others = class_image_mask_draws(3, 1, np.arange(5), 2)
    assert others.shape == (5, 2, 1 + DRAWS)
    assert len(np.unique(np.concatenate([numbers[:5, 0], others[:, 0, 0], others[:, 1, 0]]))) == 15


def test_the_ratio_is_that_of_the_images_that_are_masked():
    points, numbers = np.tile(TEMPLATE, (10_000, 1, 1)), mask_draws(0, 0, np.arange(10_000))
    config = Config.model_validate({"data": {"masks": {"ratio": 0.35, "rendered": 0.3}}})
    worn = np.array([mask is not None for mask in mask_functions(config, points, numbers, 112)])
    assert worn.mean() == pytest.approx(0.35, abs=0.02)
    assert (numbers[worn, 1] < 0.3).mean() == pytest.approx(0.3, abs=0.03)
    assert not any(mask_functions(Config(), points, numbers, 112))

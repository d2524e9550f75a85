import struct
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg

from fr_core.data.crops import TEMPLATE, encode, make_crop, similarity, square
from fr_core.data.photos import RejectedImage, read_rgb


def noise(height, width):
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)


def png(image, **options):
    return cv2.imencode(".png", image, **options)[1].tobytes()


def cmyk_jpeg():
    return simplejpeg.encode_jpeg(np.zeros((32, 32, 4), np.uint8), colorspace="CMYK", colorsubsampling="444")


def huge_png():
    body = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + body
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"IEND" * 4


JPEG = encode(noise(112, 112))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"GIF89a" + b"x" * 100, "unknown image format"),
        (JPEG[:40], "corrupt or truncated"),
        (JPEG[: len(JPEG) // 2], "corrupt or truncated"),
        (JPEG[:-20], "corrupt or truncated"),
        (b"\xff\xd8" + b"\0" * 500, "corrupt or truncated"),
        (png(noise(40, 40))[:-200], "corrupt or truncated"),
        (png(noise(40, 40))[:20], "corrupt or truncated"),
        (huge_png(), "more than 64 megapixels"),
    ],
)
def test_unusable_images_are_rejected_with_a_reason(data, reason):
    with pytest.raises(RejectedImage, match=reason):
        make_crop(data, 112)


def test_a_crop_of_the_right_size_keeps_its_bytes():
    assert make_crop(JPEG, 112) == (JPEG, None, False, False)
    data, points, odd, _ = make_crop(JPEG, 112, TEMPLATE + 2)
    assert data == JPEG
    assert np.array_equal(points, TEMPLATE + 2)
    assert not odd


def test_png_and_grey_become_rgb():
    image = noise(112, 112)
    assert np.array_equal(read_rgb(png(image[..., ::-1])), image)
    grey = simplejpeg.encode_jpeg(image[..., :1].copy(), colorspace="GRAY", colorsubsampling="Gray")
    assert read_rgb(grey).shape == (112, 112, 3)
    data, _, odd, _ = make_crop(png(image), 112)
    assert read_rgb(data).shape == (112, 112, 3)
    assert not odd


def with_orientation(jpeg, value):
    """The same JPEG with an Exif block that holds nothing but an orientation."""
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, value, 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry + struct.pack(">I", 0)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


@pytest.mark.parametrize("shape", [(112, 112), (80, 120)])
def test_photos_that_a_phone_held_sideways_are_turned_upright(shape):
    image = np.zeros((*shape, 3), np.uint8)
    image[: shape[0] // 2] = 220  # bright above; a camera turned clockwise stores it on the left
    stored = with_orientation(encode(np.rot90(image)), 6)
    assert np.abs(read_rgb(stored).astype(int) - image).mean() < 2
    crop = read_rgb(make_crop(stored, 112)[0])
    assert crop[:50].min() > 180
    assert crop[-50:].max() < 40
    upright = with_orientation(JPEG, 1)
    assert make_crop(upright, 112)[0] == upright
    damaged = upright.replace(b"MM\0*", b"XX\0*")
    assert make_crop(damaged, 112)[0] == damaged


def test_large_photos_are_averaged_not_skipped_over():
    """Stripes one pixel wide, shrunk by five: grey, where picking single pixels gives stripes."""
    image = np.zeros((560, 560, 3), np.uint8)
    image[:, ::2] = 255
    crop = read_rgb(make_crop(encode(image), 112, TEMPLATE * 5)[0]).astype(float)
    assert crop[10:-10, 10:-10].std() < 12
    assert abs(crop[10:-10, 10:-10].mean() - 127.5) < 8


def test_other_shapes_are_cut_to_their_centre_and_flagged():
    image = np.zeros((100, 300, 3), np.uint8)
    image[:, 100:200] = 200
    data, _, odd, _ = make_crop(encode(image), 112)
    assert odd
    assert read_rgb(data)[20:90, 8:104].min() > 190
    assert square(image, 50).shape == (50, 50, 3)


def test_similarity_is_the_least_squares_solution():
    random = np.random.default_rng(0)
    for _ in range(20):
        points = (random.normal(0, 60, (5, 2)) + 200).astype(np.float32)
        rows = np.zeros((10, 4))  # x' = a x − b y + c, y' = b x + a y + d
        rows[0::2] = np.column_stack([points[:, 0], -points[:, 1], np.ones(5), np.zeros(5)])
        rows[1::2] = np.column_stack([points[:, 1], points[:, 0], np.zeros(5), np.ones(5)])
        a, b, c, d = np.linalg.lstsq(rows, TEMPLATE.ravel().astype(float), rcond=None)[0]
        assert np.allclose(similarity(points, 112), [[a, -b, c], [b, a, d]], atol=1e-3)


def test_landmarks_bring_the_face_onto_the_template():
    """Five dots drawn on a turned, enlarged canvas land on the template."""
    angle, scale = 0.4, 3.0
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = (TEMPLATE @ turn.T + [220, 60]).astype(np.float32)
    image = np.zeros((600, 600, 3), np.uint8)
    for x, y in points:
        cv2.circle(image, (round(x * 16), round(y * 16)), 9 * 16, (255, 255, 255), -1, shift=4)
    data, landmarks, odd, _ = make_crop(encode(image), 112, points)
    assert not odd
    assert np.allclose(landmarks, TEMPLATE, atol=1e-2)
    crop = read_rgb(data)[..., 0].astype(float)
    for x, y in TEMPLATE:
        window = crop[int(y) - 8 : int(y) + 9, int(x) - 8 : int(x) + 9]
        rows, columns = np.indices(window.shape)
        centre = [(columns * window).sum() / window.sum() - 8, (rows * window).sum() / window.sum() - 8]
        assert np.allclose(centre, [x - int(x), y - int(y)], atol=0.6)


@pytest.mark.parametrize("points", [np.full((5, 2), 30.0), np.full((5, 2), np.nan)])
def test_unusable_landmarks_are_rejected(points):
    with pytest.raises(RejectedImage, match="unusable landmarks"):
        make_crop(encode(noise(200, 200)), 112, points)

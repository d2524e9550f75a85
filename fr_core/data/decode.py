"""JPEG bytes -> the uint8 batch that a net trains on: decoded, changed at random and resized in one warp.

Every random choice is drawn from (seed, epoch, sample id), so an image looks the same whichever rank or worker
decodes it. Legend: B batch, H W pixels.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import simplejpeg

from fr_core import rng
from fr_core.config import Augment
from fr_core.data.crops import read_rgb

_CHUNK = 16  # images per thread and turn: fewer turns than images, enough of them to share out


def augmented_batch(
    images: Sequence[bytes | np.ndarray],
    draws_BU: np.ndarray,
    size: int,
    augment: Augment,
    pool: ThreadPoolExecutor,
    fields_BFF2: np.ndarray | None = None,
) -> np.ndarray:
    """Decodes what is not decoded yet, changes it at random and resizes it, in the pool's threads.

    Args:
        images: B encoded images, or uint8 [H, W, 3], of any size.
        draws_BU: from :func:`draws`.
        size: side of the net's input, pixels.
        fields_BFF2: displacements that make virtual identities (``fr_core/data/virtual.py``).

    Returns:
        uint8 [B, size, size, 3], RGB.
    """
    out = np.empty((len(images), size, size, 3), np.uint8)

    def fill(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(images))):
            image = images[i]
            image = decode(image) if isinstance(image, bytes) else image
            field = None if fields_BFF2 is None else fields_BFF2[i]
            out[i] = augmented(image, draws_BU[i], size, augment, field)

    list(pool.map(fill, range(0, len(images), _CHUNK)))
    return out


def draws(seed: int, epoch: int, sample_ids: np.ndarray) -> np.ndarray:
    """The uniform numbers that augment each image of a batch: float64 [B, 19]."""
    return rng.uniforms(seed, "augment", epoch, sample_ids, _DRAWS)


def class_image_draws(seed: int, epoch: int, sample_ids: np.ndarray, class_images: int) -> np.ndarray:
    """As :func:`draws` for the K class images of each sample, independent of its own: float64 [B, K, 19]."""
    numbers = rng.uniforms(seed, "augment class images", epoch, sample_ids, class_images * _DRAWS)
    return numbers.reshape(-1, class_images, _DRAWS)


def decoded(jpegs: Sequence[bytes], pool: ThreadPoolExecutor) -> list[np.ndarray]:
    """Many images, in the pool's threads."""
    parts = pool.map(
        lambda start: [decode(jpeg) for jpeg in jpegs[start : start + _CHUNK]], range(0, len(jpegs), _CHUNK)
    )
    return [image for part in parts for image in part]


def decode(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3], RGB. JPEG by libjpeg-turbo, anything else by OpenCV."""
    if data[:2] == b"\xff\xd8":
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=False)
    return read_rgb(data)


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """The image at the net's input size: training's warp without its random part. uint8 [size, size, 3]."""
    if image.shape[:2] == (size, size):
        return image
    return cv2.warpAffine(image, _warp(image.shape, size), (size, size), flags=cv2.INTER_LINEAR)


_DRAWS = 19


def augmented(
    image: np.ndarray, u: np.ndarray, size: int, augment: Augment, field: np.ndarray | None = None
) -> np.ndarray:
    """One image changed as ``augment`` allows and the uniform draws ``u`` [19] decide; resized to [size, size, 3]."""
    signed = 2 * u - 1
    flip = bool(u[0] < augment.flip)
    if u[14] < augment.blur:
        image = _blurred(image, 1 + 2 * u[15])
    matrix = _warp(
        image.shape,
        size,
        flip=flip,
        shift=(augment.shift * signed[1], augment.shift * signed[2]),
        zoom=(1 + augment.scale) ** signed[3],
        degrees=augment.rotate * signed[4],
    )
    if field is not None:
        image = _displaced(image, matrix, size, field)
    elif image.shape[:2] == (size, size) and not (augment.shift or augment.scale or augment.rotate):
        image = np.array(image[:, ::-1] if flip else image)  # what the warp would give, sooner
    else:
        image = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    if u[5] < augment.grey:
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if augment.light or augment.colour:
        image = _lit(image, augment.light * signed[6], augment.light * signed[7], augment.colour * signed[8:11])
    if u[11] < augment.erase:
        image = _erased(image, augment.erase_area * u[12], 2.0 ** signed[13], u[16], u[17], u[18])
    return image


def _warp(
    shape: tuple[int, ...],
    size: int,
    flip: bool = False,
    shift: tuple[float, float] = (0.0, 0.0),
    zoom: float = 1.0,
    degrees: float = 0.0,
) -> np.ndarray:
    """The affine map from source to net pixels, about the centres of both: float64 [2, 3]."""
    scale = zoom * size / max(shape[:2])
    angle = np.deg2rad(degrees)
    a, b = scale * np.cos(angle), scale * np.sin(angle)
    linear = np.array([[-a, b], [b, a]]) if flip else np.array([[a, -b], [b, a]])
    centre = (np.array(shape[1::-1]) - 1) / 2
    target = (size - 1) / 2 + size * np.array(shift)
    return np.column_stack([linear, target - linear @ centre])


def _displaced(image: np.ndarray, matrix: np.ndarray, size: int, field: np.ndarray) -> np.ndarray:
    """The warp by ``matrix``, its sources displaced by a field [F, F, 2] that lies over the image."""
    side = max(image.shape[:2])
    shrunk = matrix @ np.diag([side / len(field), side / len(field), 1.0])  # from the field's pixels to the net's
    shrunk[:, 2] += matrix[:, :2] @ np.full(2, (side / len(field) - 1) / 2)
    moved = cv2.warpAffine(field, shrunk, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    moved = side * moved + cv2.transform(_pixels(size), cv2.invertAffineTransform(matrix))
    both: Any = None  # no second map: x and y are in the first
    return cv2.remap(image, moved, both, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


@lru_cache(maxsize=4)
def _pixels(size: int) -> np.ndarray:
    """(x, y) of every pixel: float32 [size, size, 2]."""
    axis = np.arange(size, dtype=np.float32)
    return np.stack(np.meshgrid(axis, axis), 2)


def _lit(image: np.ndarray, brightness: float, contrast: float, gains: np.ndarray) -> np.ndarray:
    """Contrast about the mean, brightness and a gain per channel, as one table look-up of 256 × 3 entries."""
    mean = image.mean()
    levels = (np.arange(256.0)[:, None] - mean) * (1 + contrast) + mean
    table = np.clip(levels * (1 + brightness) * (1 + gains), 0, 255).astype(np.uint8)
    return cv2.LUT(image, table[None])


def _blurred(image: np.ndarray, factor: float) -> np.ndarray:
    height, width = image.shape[:2]
    small = cv2.resize(image, (round(width / factor), round(height / factor)), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


def _erased(image: np.ndarray, area: float, aspect: float, x: float, y: float, grey: float) -> np.ndarray:
    """Overwrites one rectangle of ``area`` (share of the image) and ``aspect`` with a grey level."""
    size = image.shape[0]
    width = min(size, max(1, round(size * np.sqrt(area * aspect))))
    height = min(size, max(1, round(size * np.sqrt(area / aspect))))
    left, top = round(x * (size - width)), round(y * (size - height))
    image[top : top + height, left : left + width] = round(255 * grey)
    return image

"""JPEG bytes -> the uint8 batch that a net trains on: decoded, changed at random and resized in one warp.

Every random choice is drawn from (seed, epoch, sample id), so an image looks the same whichever rank or worker
decodes it. Legend: B batch, H W pixels.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import simplejpeg

from fr_core import rng
from fr_core.config import Augment
from fr_core.data.crops import read_rgb

_CHUNK = 16  # images per thread and turn: fewer turns than images, enough of them to share out


def decode_batch(
    jpegs: Sequence[bytes],
    sample_ids: np.ndarray,
    size: int,
    augment: Augment,
    seed: int,
    epoch: int,
    pool: ThreadPoolExecutor,
) -> np.ndarray:
    """Decodes and augments a batch.

    Args:
        jpegs: B encoded images of any size.
        sample_ids: int64 [B].
        size: side of the net's input, pixels.

    Returns:
        uint8 [B, size, size, 3], RGB.
    """
    draws_BU = rng.uniforms(seed, "augment", epoch, sample_ids, _DRAWS)
    images = np.empty((len(jpegs), size, size, 3), np.uint8)

    def fill(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(jpegs))):
            images[i] = augmented(decode(jpegs[i]), draws_BU[i], size, augment)

    list(pool.map(fill, range(0, len(jpegs), _CHUNK)))
    return images


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


def augmented(image: np.ndarray, u: np.ndarray, size: int, augment: Augment) -> np.ndarray:
    """One image changed as ``augment`` allows and the uniform draws ``u`` [19] decide; resized to [size, size, 3]."""
    signed = 2 * u - 1
    if u[14] < augment.blur:
        image = _blurred(image, 1 + 2 * u[15])
    matrix = _warp(
        image.shape,
        size,
        flip=u[0] < augment.flip,
        shift=(augment.shift * signed[1], augment.shift * signed[2]),
        zoom=(1 + augment.scale) ** signed[3],
        degrees=augment.rotate * signed[4],
    )
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

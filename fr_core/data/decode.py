"""JPEG bytes → the uint8 batch that a net trains on: decoded, augmented, and resized in one warp.

Every random choice is drawn from (seed, epoch, sample id). So an image looks the same on every rank and worker.

Legend: B batch, N some images of it, H W pixels, U uniform numbers of an image, F side of a displacement field.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import cv2
import numpy as np
import simplejpeg

from fr_core import rng
from fr_core.config.sections import Augment
from fr_core.data.crops import warped
from fr_core.data.masks import Mask
from fr_core.data.photos import read_rgb

DRAWS = 19  # uniform numbers per image
_CHUNK = 16  # images per task of a thread


def begin_batch(
    images: Sequence[bytes | np.ndarray],
    draws_BU: np.ndarray,
    size: int,
    augment: Augment,
    pool: ThreadPoolExecutor,
    fields_BFF2: np.ndarray | None = None,
    small: int | None = None,
    masks: Sequence[Mask | None] | None = None,
) -> Callable[[], np.ndarray]:
    """Begin to decode, augment and resize a batch in the threads of a pool.

    Args:
        images: B encoded images, or decoded ones of any size, uint8 [H, W, 3].
        draws_BU: uniform numbers from :func:`augment_draws`.
        size: side of the net's input, pixels.
        augment: kinds and strengths of augmentation.
        pool: threads that do the work.
        fields_BFF2: displacement fields that make virtual identities (``fr_core/data/virtual.py``).
        small: side to which the finished images are shrunk, for progressive resizing.
        masks: functions from :func:`fr_core.data.masks.mask_functions`, applied before any augmentation.

    Returns:
        Function that waits for the batch: uint8 [B, size, size, 3], RGB; with ``small``, [B, small, small, 3].
    """
    out = np.empty((len(images), size, size, 3), np.uint8)
    shrunk = out if small in (None, size) else np.empty((len(images), small, small, 3), np.uint8)

    def fill(start: int) -> None:
        """Make the images of one chunk of the batch."""
        part = slice(start, start + _CHUNK)
        fields = None if fields_BFF2 is None else fields_BFF2[part]
        augment_images(out[part], images[part], draws_BU[part], augment, fields, masks and masks[part])
        if shrunk is not out:
            for image, little in zip(out[part], shrunk[part], strict=True):
                cv2.resize(image, little.shape[:2], little, interpolation=cv2.INTER_AREA)

    chunks = pool.map(fill, range(0, len(images), _CHUNK))

    def finished() -> np.ndarray:
        """Wait for all chunks, and raise what failed in one."""
        list(chunks)
        return shrunk

    return finished


def augment_images(
    out_NHWC: np.ndarray,
    images: Sequence[bytes | np.ndarray],
    draws_NU: np.ndarray,
    augment: Augment,
    fields_NFF2: np.ndarray | None = None,
    masks: Sequence[Mask | None] | None = None,
) -> None:
    """Decode, augment and resize N images one after the other, in this thread.

    Args:
        out_NHWC: the results, written in place; their side is the net's.
        images, draws_NU, augment, fields_NFF2, masks: those of :func:`begin_batch`.
    """
    size = out_NHWC.shape[1]
    rows = [_prepared(image, mask, size) for image, mask in zip(images, masks or [None] * len(images), strict=True)]
    shapes = [row.shape[:2] for row in rows]
    matrices: Iterable[np.ndarray | None] = itertools.repeat(None)
    moved = fields_NFF2 is not None or augment.shift or augment.scale or augment.rotate
    if moved or set(shapes) != {(size, size)}:
        matrices = _random_warps(np.array(shapes), draws_NU, size, augment)
    fields = itertools.repeat(None) if fields_NFF2 is None else fields_NFF2
    for out, row, matrix, u, field in zip(out_NHWC, rows, matrices, draws_NU.tolist(), fields, strict=False):
        _augment(out, row, matrix, u, augment, field)


def augment_draws(seed: int, epoch: int, sample_ids: np.ndarray) -> np.ndarray:
    """Draw the uniform numbers that augment each image of a batch: float64 [B, 19]."""
    return rng.uniforms(seed, "augment", epoch, sample_ids, DRAWS)


def second_view_draws(seed: int, epoch: int, sample_ids: np.ndarray) -> np.ndarray:
    """Draw the numbers of a second augmented copy of each image, independent of the first: float64 [B, 19]."""
    return rng.uniforms(seed, "augment second view", epoch, sample_ids, DRAWS)


def class_image_draws(seed: int, epoch: int, sample_ids: np.ndarray, class_images: int) -> np.ndarray:
    """Draw the numbers of each sample's K class images, independent of the sample's numbers: float64 [B, K, 19]."""
    numbers = rng.uniforms(seed, "augment class images", epoch, sample_ids, class_images * DRAWS)
    return numbers.reshape(-1, class_images, DRAWS)


def decode_all(jpegs: Sequence[bytes], pool: ThreadPoolExecutor) -> list[np.ndarray]:
    """Decode many images in the threads of a pool."""
    parts = pool.map(
        lambda start: [decode(jpeg) for jpeg in jpegs[start : start + _CHUNK]], range(0, len(jpegs), _CHUNK)
    )
    return [image for part in parts for image in part]


def decode(data: bytes) -> np.ndarray:
    """Decode an image: uint8 [H, W, 3], RGB. JPEG by libjpeg-turbo, other formats by OpenCV."""
    if data[:2] == b"\xff\xd8":
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=False)
    return read_rgb(data)


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """Resize an image to the net's input size, uint8 [size, size, 3]: training's warp without its random part."""
    image = averaged(image, size)
    if image.shape[:2] == (size, size):
        return image
    (matrix,) = _warps(np.array([image.shape[:2]]), size)
    return warped(image, matrix, size)


def averaged(image: np.ndarray, size: int) -> np.ndarray:
    """Shrink an image whose longer side exceeds ``size`` pixels to that side, by area averages, which do not alias."""
    height, width = image.shape[:2]
    shrink = max(height, width) / size
    if shrink <= 1:
        return image
    shape = max(1, round(width / shrink)), max(1, round(height / shrink))
    return cv2.resize(image, shape, interpolation=cv2.INTER_AREA)


_LEVELS = np.arange(256.0)[:, None]


def _prepared(image: bytes | np.ndarray, mask: Mask | None, size: int) -> np.ndarray:
    """Decode an image, put on its mask, and shrink it towards the net's size."""
    decoded = decode(image) if isinstance(image, bytes) else image
    return averaged(mask(decoded) if mask else decoded, size)


def _augment(
    out: np.ndarray,
    image: np.ndarray,
    matrix: np.ndarray | None,
    u: list[float],
    augment: Augment,
    field: np.ndarray | None,
) -> None:
    """Write one image into ``out`` [size, size, 3], changed as ``augment`` allows and the draws ``u`` [19] decide.

    Args:
        out: the result, written in place.
        image: uint8 [H, W, 3].
        matrix: warp of the image [2, 3], or None if an image of the right size may only be flipped.
        u: uniform numbers of the image.
        augment: kinds and strengths of augmentation.
        field: displacement field [F, F, 2] of a virtual identity, or None.
    """
    size = len(out)
    if u[14] < augment.blur:
        image = _blurred(image, 1 + 2 * u[15])
    if matrix is None:
        if u[0] < augment.flip:
            cv2.flip(image, 1, out)
        else:
            out[:] = image
    elif field is not None:
        _displace(out, image, matrix, field)
    else:
        cv2.warpAffine(image, matrix, (size, size), out, cv2.INTER_LINEAR, cv2.BORDER_REFLECT_101)
    if u[5] < augment.grey:
        cv2.cvtColor(cv2.cvtColor(out, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB, out)
    if augment.light or augment.colour:
        _light(out, augment, 2 * np.array(u[6:11]) - 1)
    if u[11] < augment.erase:
        _erase(out, augment.erase_area * u[12], 2.0 ** (2 * u[13] - 1), u[16], u[17], u[18])


def _random_warps(shapes_B2: np.ndarray, draws_BU: np.ndarray, size: int, augment: Augment) -> np.ndarray:
    """Return the warps that the draws decide: float64 [B, 2, 3]."""
    signed = 2 * draws_BU - 1
    return _warps(
        shapes_B2,
        size,
        flip=draws_BU[:, 0] < augment.flip,
        shift=augment.shift * signed[:, 1:3],
        zoom=(1 + augment.scale) ** signed[:, 3],
        degrees=augment.rotate * signed[:, 4],
    )


def _warps(
    shapes_B2: np.ndarray,
    size: int,
    flip: bool | np.ndarray = False,
    shift: float | np.ndarray = 0.0,
    zoom: float | np.ndarray = 1.0,
    degrees: float | np.ndarray = 0.0,
) -> np.ndarray:
    """Return the affine maps from source to net pixels, about the centres of both: float64 [B, 2, 3].

    Args:
        shapes_B2: heights and widths of the sources.
        size: side of the net's input, pixels.
        flip: whether images are mirrored; one value for all, or [B].
        zoom: factor on the scale; one value for all, or [B].
        degrees: rotation; one value for all, or [B].
        shift: share of the side; one value for all, or [B, 2].
    """
    scale = zoom * size / shapes_B2.max(1)
    a, b, sign = scale * np.cos(np.deg2rad(degrees)), scale * np.sin(np.deg2rad(degrees)), np.where(flip, -1, 1)
    linear = np.stack([sign * a, -sign * b, b, a], 1).reshape(-1, 2, 2)
    centre = (shapes_B2[:, ::-1, None] - 1) / 2
    target = np.broadcast_to((size - 1) / 2 + size * np.asarray(shift), shapes_B2.shape)
    return np.concatenate([linear, target[:, :, None] - linear @ centre], 2)


def _displace(out: np.ndarray, image: np.ndarray, matrix: np.ndarray, field: np.ndarray) -> None:
    """Warp an image by ``matrix``; the field [F, F, 2] that covers the image displaces the source pixels."""
    side, size = max(image.shape[:2]), len(out)
    shrunk = matrix @ np.diag([side / len(field), side / len(field), 1.0])  # the field's pixels to the net's
    shrunk[:, 2] += matrix[:, :2] @ np.full(2, (side / len(field) - 1) / 2)
    moved = cv2.warpAffine(field, shrunk, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    moved = side * moved + cv2.transform(_pixels(size), cv2.invertAffineTransform(matrix))
    # The first map holds both x and y.
    cv2.remap(image, moved, None, cv2.INTER_LINEAR, out, cv2.BORDER_REFLECT_101)  # type: ignore[call-overload]


@lru_cache(maxsize=4)
def _pixels(size: int) -> np.ndarray:
    """Return (x, y) of every pixel: float32 [size, size, 2]."""
    axis = np.arange(size, dtype=np.float32)
    return np.stack(np.meshgrid(axis, axis), 2)


def _light(image: np.ndarray, augment: Augment, signed: np.ndarray) -> None:
    """Change contrast about the mean, brightness and each channel's gain, by one look-up table of 256 × 3 entries."""
    mean = sum(cv2.sumElems(image)) / image.size
    levels = (_LEVELS - mean) * (1 + augment.light * signed[1]) + mean
    gains = (1 + augment.light * signed[0]) * (1 + augment.colour * signed[2:])
    cv2.LUT(image, (levels * gains).clip(0, 255).astype(np.uint8)[None], image)


def _blurred(image: np.ndarray, factor: float) -> np.ndarray:
    """Blur an image by shrinking it by ``factor`` and enlarging it again."""
    height, width = image.shape[:2]
    small = cv2.resize(image, (round(width / factor), round(height / factor)), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


def _erase(image: np.ndarray, area: float, aspect: float, x: float, y: float, grey: float) -> None:
    """Overwrite one rectangle of ``area`` (share of the image) and ``aspect`` with a grey level."""
    size = image.shape[0]
    width = min(size, max(1, round(size * np.sqrt(area * aspect))))
    height = min(size, max(1, round(size * np.sqrt(area / aspect))))
    left, top = round(x * (size - width)), round(y * (size - height))
    image[top : top + height, left : left + width] = round(255 * grey)

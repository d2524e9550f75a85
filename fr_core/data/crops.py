"""One source image → one upright, square face crop, or the reason for its rejection.

A crop is `size`×`size` RGB. Its five points lie on the template that the field's public datasets share. A JPEG that
is such a crop already keeps its bytes. All other images are decoded, aligned or resized, and encoded once.
"""

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

from fr_core.data.photos import RejectedImage, read_photo

TEMPLATE = np.array([(38.29, 51.70), (73.53, 51.50), (56.03, 71.74), (41.55, 92.37), (70.73, 92.20)], np.float32)
TEMPLATE_SIZE = 112  # side of the crop that TEMPLATE refers to, pixels
ALIGNED_WITHIN = 1 / 6  # share of the side: an aligned crop's points lie nearer to the template on average
FARTHEST = 15  # root mean square distance of a face's points from the template after the fit, pixels of 112
SMALLEST_FACE = 8  # side of the square in the image that becomes the crop, pixels
TINY = f"smaller than {SMALLEST_FACE} pixels"
QUALITY = 95  # JPEG quality of encoded crops


class Crop(NamedTuple):
    """The crop of an image."""

    jpeg: bytes
    landmarks: np.ndarray | None  # float32 [5, 2], in pixels of the crop; None if unknown
    not_square: bool  # the image was not square, and its central square was taken
    repaired: bool  # the image was a JPEG without end marker, or with extra bytes


def make_crop(
    data: bytes,
    size: int,
    landmarks: np.ndarray | None = None,
    find: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Crop:
    """Make the aligned crop of an image, as JPEG bytes.

    Without landmarks, the image is taken for a crop: its central square is resized.

    Args:
        data: bytes of an image file.
        size: side of the crop, pixels.
        landmarks: float32 [5, 2], the five points in pixels of the upright image, or None.
        find: finds the five points in an image, uint8 [H, W, 3] RGB; called if ``landmarks`` is None.

    Raises:
        RejectedImage: as :func:`fr_core.data.photos.read_photo` and ``find``, the image is a few pixels wide or high,
            or the landmarks are not those of a face in it.
    """
    image, as_stored, repaired = read_photo(data)
    height, width = image.shape[:2]
    if min(height, width) < SMALLEST_FACE:
        raise RejectedImage(TINY)
    if landmarks is None and find is not None:
        landmarks = find(image)
    if landmarks is not None:
        landmarks = np.asarray(landmarks, np.float32)
        is_crop = height == width == size and _template_distance(landmarks, size) <= ALIGNED_WITHIN * size
        if not is_crop:
            matrix = similarity(landmarks, size)
            refuse_absurd(landmarks, matrix, (height, width), size)
            moved = landmarks @ matrix[:, :2].T + matrix[:, 2]
            return Crop(encode(warped(image, matrix, size)), moved, False, repaired)
    if height == width == size and as_stored:
        return Crop(data, landmarks, False, False)
    return Crop(encode(square(image, size)), landmarks, height != width, repaired)


def refuse_absurd(landmarks: np.ndarray, matrix: np.ndarray, shape: tuple[int, int], size: int) -> None:
    """Reject landmarks that no face in the image has.

    Args:
        landmarks: float32 [5, 2], pixels.
        matrix: float32 [2, 3], the similarity that carries them onto the template.
        shape: height and width of the image.
        size: side of the crop, pixels.

    Raises:
        RejectedImage: their middle lies outside of the image, the face would be a few pixels wide, or they do not fit
            the template.
    """
    x, y = landmarks.mean(0)
    if not (0 <= x <= shape[1] and 0 <= y <= shape[0]):
        raise RejectedImage("landmarks outside the image")
    if size / np.hypot(matrix[0, 0], matrix[1, 0]) < SMALLEST_FACE:
        raise RejectedImage("landmarks of a face of a few pixels")
    if misfits(landmarks[None])[0] > FARTHEST:
        raise RejectedImage("landmarks not of a face")


def misfits(points_N52: np.ndarray) -> np.ndarray:
    """Return how far each five points are from the template after the best similarity.

    Returns:
        float64 [N], root mean square distance in pixels of the 112×112 crop; 23.2, the template's extent, at most.
    """
    plane = np.array([1, 1j])
    source_N5, target_5 = points_N52.astype(np.float64) @ plane, TEMPLATE.astype(np.float64) @ plane
    source_N5 = source_N5 - source_N5.mean(1, keepdims=True)
    target_5 = target_5 - target_5.mean()
    spread_N1 = np.maximum((np.abs(source_N5) ** 2).sum(1, keepdims=True), 1e-12)
    turn_N1 = (source_N5.conj() @ target_5)[:, None] / spread_N1
    return np.sqrt((np.abs(turn_N1 * source_N5 - target_5) ** 2).mean(1))


def central_square(image: np.ndarray) -> np.ndarray:
    """Cut the largest central square from an image."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return np.ascontiguousarray(image[top : top + side, left : left + side])


def square(image: np.ndarray, size: int) -> np.ndarray:
    """Resize the central square of an image to [size, size, 3]."""
    image = central_square(image)
    if len(image) == size:
        return image
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if len(image) > size else cv2.INTER_LINEAR)


def similarity(landmarks: np.ndarray, size: int) -> np.ndarray:
    """Fit the rotation, scale and shift that carries five points onto the template: float32 [2, 3].

    Raises:
        RejectedImage: the points coincide or are not finite.
    """
    (matrix,) = similarities(landmarks[None], size)
    if np.isnan(matrix).any():
        raise RejectedImage("unusable landmarks")
    return matrix


def similarities(points_N52: np.ndarray, size: int) -> np.ndarray:
    """Fit the rotation, scale and shift that carries each five points onto the template.

    The fit is least-squares: Umeyama, "Least-squares estimation of transformation parameters between two point
    patterns", IEEE TPAMI 1991.

    Returns:
        float32 [N, 2, 3], NaN where the points coincide or are not finite.
    """
    plane = np.array([1, 1j])
    with np.errstate(invalid="ignore"):  # points that are not finite
        source_N5, target_5 = points_N52 @ plane, (TEMPLATE * (size / TEMPLATE_SIZE)) @ plane
        source_mean_N, target_mean = source_N5.mean(1), target_5.mean()
        source_N5 -= source_mean_N[:, None]
        spread_N = (source_N5 * source_N5.conj()).sum(1).real
        spread_N[~(np.isfinite(spread_N) & (spread_N >= 1e-6))] = np.nan
        # For complex points, the optimal rotation and scale is the quotient ⟨source, target⟩ / ⟨source, source⟩.
        turn_N = (source_N5.conj() @ target_5) / spread_N
        shift_N = target_mean - turn_N * source_mean_N
    rows = (turn_N.real, -turn_N.imag, shift_N.real), (turn_N.imag, turn_N.real, shift_N.imag)
    return np.array(rows).transpose(2, 0, 1).astype(np.float32)


def encode(image: np.ndarray, quality: int = QUALITY) -> bytes:
    """Encode an image, uint8 [H, W, 3] RGB, as a JPEG without chroma subsampling."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling="444"
    )


def warped(image: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """Warp an image by a similarity. When shrinking, average source pixels first: warpAffine alone would alias."""
    shrink = int(1 / np.hypot(matrix[0, 0], matrix[1, 0]))
    if shrink >= 2:
        height, width = (max(1, round(side / shrink)) for side in image.shape[:2])
        scale = np.array([image.shape[1] / width, image.shape[0] / height])
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        # Pixel centres: x_source = scale·(x_small + ½) − ½.
        shift = matrix[:, :2] @ ((scale - 1) / 2) + matrix[:, 2]
        matrix = np.column_stack([matrix[:, :2] * scale, shift])
    return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR)


def _template_distance(landmarks: np.ndarray, size: int) -> float:
    """Return the mean distance of five points from the template, in pixels of a crop of side ``size``."""
    return float(np.linalg.norm(landmarks - TEMPLATE * (size / TEMPLATE_SIZE), axis=1).mean())

"""One source image → one upright, square face crop, or the reason for its rejection.

A crop is `size`×`size` RGB. Its five points lie on the template that the field's public datasets share. A JPEG that
is such a crop already keeps its bytes. All other images are decoded, aligned or resized, and encoded once.
"""

import io
import stat
import struct
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from fr_core.data.store import AnyPath

TEMPLATE = np.array([(38.29, 51.70), (73.53, 51.50), (56.03, 71.74), (41.55, 92.37), (70.73, 92.20)], np.float32)
TEMPLATE_SIZE = 112  # side of the crop that TEMPLATE refers to, pixels
ALIGNED_WITHIN = 1 / 6  # share of the side: an aligned crop's points lie nearer to the template on average
MAX_PIXELS = 64_000_000  # larger images are refused by their header
LONGEST = 64 * 2**20  # bytes of an encoded image, at most
QUALITY = 95  # JPEG quality of encoded crops
UPRIGHT, ORIENTATION = 1, 0x0112  # Exif: value for upright, tag of the orientation


class RejectedImage(Exception):
    """An image that cannot be used. The message is one of a few constant reasons, so that they can be counted."""


def read_file(path: AnyPath) -> bytes:
    """Read the bytes of an image file.

    Raises:
        OSError: the file is missing or unreadable.
        RejectedImage: the path is invalid, the file is no regular file, or it has more than 64 MiB.
    """
    try:
        status = path.stat()
    except ValueError:  # a NUL byte
        raise RejectedImage("no path") from None
    if not stat.S_ISREG(status.st_mode):
        raise RejectedImage("no regular file")
    if status.st_size > LONGEST:
        raise RejectedImage("too large")
    return path.read_bytes()


def make_crop(
    data: bytes,
    size: int,
    landmarks: np.ndarray | None = None,
    find: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[bytes, np.ndarray | None, bool]:
    """Make the aligned crop of an image, as JPEG bytes.

    Without landmarks, the image is taken for a crop: its central square is resized.

    Args:
        data: bytes of a JPEG or PNG file.
        size: side of the crop, pixels.
        landmarks: float32 [5, 2], the five points in pixels of the upright image, or None.
        find: finds the five points in an image, uint8 [H, W, 3] RGB; called if ``landmarks`` is None.

    Returns:
        The JPEG, the landmarks in its pixels (None if unknown), and whether the image was not square.

    Raises:
        RejectedImage: the image is empty, corrupt, truncated, CMYK, 16-bit, too large, or neither JPEG nor PNG. Also
            what ``find`` raises.
    """
    image = read_rgb(data)
    height, width = image.shape[:2]
    if landmarks is None and find is not None:
        landmarks = find(image)
    if landmarks is not None:
        landmarks = np.asarray(landmarks, np.float32)
        is_crop = height == width == size and _template_distance(landmarks, size) <= ALIGNED_WITHIN * size
        if not is_crop:
            matrix = similarity(landmarks, size)
            return encode(warped(image, matrix, size)), landmarks @ matrix[:, :2].T + matrix[:, 2], False
    if height == width == size and data[:2] == b"\xff\xd8" and orientation(data) == UPRIGHT:
        return data, landmarks, False
    return encode(square(image, size)), landmarks, height != width


def read_rgb(data: bytes) -> np.ndarray:
    """Decode a JPEG or PNG strictly, turned upright by its Exif orientation: uint8 [H, W, 3], RGB.

    Raises:
        RejectedImage: as :func:`make_crop`.
    """
    if not data:
        raise RejectedImage("empty file")
    if data[:2] == b"\xff\xd8":
        return _read_jpeg(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _read_png(data)
    raise RejectedImage("neither JPEG nor PNG")


def orientation(data: bytes) -> int:
    """Return the Exif orientation of a JPEG, or 1 (upright) if there is none."""
    if b"Exif\0\0" not in data[: 2**16]:
        return UPRIGHT
    try:
        with Image.open(io.BytesIO(data)) as image:
            return int(image.getexif().get(ORIENTATION, UPRIGHT))
    except (OSError, ValueError, TypeError, SyntaxError, struct.error):  # Pillow's errors for damaged Exif
        return UPRIGHT


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

    The fit is least-squares: Umeyama, "Least-squares estimation of transformation parameters between two point
    patterns", IEEE TPAMI 1991.

    Raises:
        RejectedImage: the points coincide or are not finite.
    """
    plane = np.array([1, 1j])
    source, target = landmarks @ plane, (TEMPLATE * (size / TEMPLATE_SIZE)) @ plane
    source_mean, target_mean = source.sum() / 5, target.sum() / 5
    source -= source_mean
    spread = np.vdot(source, source).real
    if not np.isfinite(spread) or spread < 1e-6:
        raise RejectedImage("unusable landmarks")
    # For complex points, the optimal rotation and scale is the quotient ⟨source, target⟩ / ⟨source, source⟩.
    turn = complex(np.vdot(source, target)) / spread
    shift = complex(target_mean) - turn * complex(source_mean)
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]], np.float32)


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


def _read_jpeg(data: bytes) -> np.ndarray:
    """Decode a JPEG strictly and turn it upright."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        raise RejectedImage("corrupt or truncated") from None
    if colours in ("CMYK", "YCCK"):
        raise RejectedImage("CMYK")
    _refuse_huge(height, width)
    try:
        image = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError:
        raise RejectedImage("corrupt or truncated") from None
    if orientation(data) == UPRIGHT:
        return image
    turned = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if turned is None:
        raise RejectedImage("corrupt or truncated")
    return turned


def _read_png(data: bytes) -> np.ndarray:
    """Decode a PNG, refusing a truncated one."""
    try:
        width, height, depth = struct.unpack(">IIB", data[16:25])
    except struct.error:
        raise RejectedImage("corrupt or truncated") from None
    if depth > 8:
        raise RejectedImage("16-bit")
    _refuse_huge(height, width)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:
        image = None
    # OpenCV returns the readable part of a truncated PNG, but a complete PNG ends in an IEND chunk.
    if image is None or b"IEND" not in data[-16:]:
        raise RejectedImage("corrupt or truncated")
    return image


def _refuse_huge(height: int, width: int) -> None:
    """Reject an image by the size in its header, before any pixel is decoded."""
    if height * width > MAX_PIXELS:
        raise RejectedImage(f"more than {MAX_PIXELS // 1_000_000} megapixels")


def _template_distance(landmarks: np.ndarray, size: int) -> float:
    """Return the mean distance of five points from the template, in pixels of a crop of side ``size``."""
    return float(np.linalg.norm(landmarks - TEMPLATE * (size / TEMPLATE_SIZE), axis=1).mean())

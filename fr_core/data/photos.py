"""The bytes of one image file → upright RGB pixels, or the reason why they are not used.

Read are JPEG, PNG, BMP, WEBP, TIFF, GIF and PNM, whatever the file's suffix says. A JPEG without its end marker, or
with extra bytes, is repaired: viewers show such files whole.
"""

import io
import stat
import struct
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from fr_core.data.stand_ins import HEAD, stand_in
from fr_core.data.store import AnyPath

SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".webp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pnm"),
    *(".heic", ".heif", ".avif", ".jp2", ".jxl", ".tga", ".dib"),  # of photos, too: read if they are another format
}
FILE_TYPE = b"ftyp"  # bytes 4 to 8 of HEIC and AVIF
MAX_PIXELS = 64_000_000  # larger images are refused by their header
HUGE = f"more than {MAX_PIXELS // 1_000_000} megapixels"
LONGEST = 64 * 2**20  # bytes of an encoded image, at most
UPRIGHT, ORIENTATION = 1, 0x0112  # Exif: value for upright, tag of the orientation
START, END = b"\xff\xd8", b"\xff\xd9"  # markers of a JPEG
PNG = b"\x89PNG\r\n\x1a\n"
PNG_END = b"IEND\xae\x42\x60\x82"  # the last chunk of a complete PNG, with its checksum
BITS_OF_PNG = 24  # offset of the byte that tells the bits of a value
OTHERS = ("BMP", "WEBP", "TIFF", "GIF", "PPM")  # formats that Pillow decodes
HARMLESS = ("extraneous bytes", "Invalid SOS parameters", "JFIF revision", "Adobe color")  # warnings of libjpeg
PILLOW_ERRORS = (OSError, ValueError, TypeError, SyntaxError, struct.error, EOFError, IndexError, KeyError)


class RejectedImage(Exception):
    """An image that cannot be used. The message is one of a few constant reasons, so that they can be counted."""


class Photo(NamedTuple):
    """A decoded image file."""

    rgb: np.ndarray  # uint8 [H, W, 3], upright
    as_stored: bool  # the file is a JPEG of just these pixels, neither repaired nor turned
    repaired: bool  # the JPEG lacked its end marker, or had extra bytes


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


def read_rgb(data: bytes) -> np.ndarray:
    """Decode an image, turned upright by its Exif orientation: uint8 [H, W, 3], RGB.

    Raises:
        RejectedImage: as :func:`read_photo`.
    """
    return read_photo(data).rgb


def read_photo(data: bytes) -> Photo:
    """Decode an image of a known format.

    Transparency is dropped. Values of more than 8 bits become 8 (:func:`eight_bits`). Of several frames, the first is
    taken.

    Raises:
        RejectedImage: the image is empty, corrupt, truncated, too large, or of another format.
    """
    if not data:
        raise RejectedImage("empty file")
    if what := stand_in(data[:HEAD]):
        raise RejectedImage(what)
    if data[4:8] == FILE_TYPE:
        raise RejectedImage("HEIC or AVIF: convert it to JPEG")
    if data[:2] == START:
        return _read_jpeg(data)
    if data[:8] == PNG:
        return Photo(_read_png(data), False, False)
    return Photo(_read_by_pillow(data, OTHERS), False, False)


def orientation(data: bytes) -> int:
    """Return the Exif orientation of a JPEG, or 1 (upright) if there is none."""
    if b"Exif\0\0" not in data[: 2**16]:
        return UPRIGHT
    try:
        with Image.open(io.BytesIO(data)) as image:
            return int(image.getexif().get(ORIENTATION, UPRIGHT))
    except PILLOW_ERRORS:  # damaged Exif
        return UPRIGHT


def _read_jpeg(data: bytes) -> Photo:
    """Decode a JPEG, repaired if need be, and turn it upright."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # KeyError: simplejpeg's, for a header without colours
        raise RejectedImage("corrupt or truncated") from None
    _refuse_huge(height, width)
    rgb, fault = _decode(data)
    if fault and fault.startswith("Premature end of JPEG file"):  # the end marker lacks, perhaps pixels too
        data += END
        rgb, fault_inside = _decode(data)
        fault = fault_inside or HARMLESS[0]
    if fault and not any(warning in fault for warning in HARMLESS):
        raise RejectedImage("corrupt or truncated")
    if colours in ("CMYK", "YCCK"):
        return Photo(_read_by_pillow(data, ("JPEG",)), False, fault is not None)
    turned = orientation(data) != UPRIGHT
    if turned or rgb is None:
        rgb = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if rgb is None:
        raise RejectedImage("corrupt or truncated")
    return Photo(rgb, not turned and not fault, fault is not None)


def _decode(data: bytes) -> tuple[np.ndarray | None, str | None]:
    """Decode a JPEG strictly; return its pixels, or None and libjpeg's first warning."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True), None
    except ValueError as error:
        return None, str(error)


def _read_png(data: bytes) -> np.ndarray:
    """Decode a PNG, refusing a truncated one, of which OpenCV would return the readable part."""
    try:
        width, height = struct.unpack(">II", data[16:24])
    except struct.error:
        raise RejectedImage("corrupt or truncated") from None
    _refuse_huge(height, width)
    if not height * width or PNG_END not in data:
        raise RejectedImage("corrupt or truncated")
    deep = cv2.IMREAD_ANYDEPTH if data[BITS_OF_PNG] > 8 else 0
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | deep)
    except cv2.error:
        image = None
    if image is None:
        raise RejectedImage("corrupt or truncated")
    return eight_bits(image) if deep else image


def _read_by_pillow(data: bytes, formats: tuple[str, ...]) -> np.ndarray:
    """Decode an image of one of the formats; Pillow refuses truncated ones."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError:
        raise RejectedImage(HUGE) from None
    except PILLOW_ERRORS:
        raise RejectedImage("unknown image format") from None
    _refuse_huge(image.height, image.width)
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # more than 8 bits, which Pillow would clip at 255
            image = Image.fromarray(eight_bits(np.asarray(image)))
        return np.asarray(image.convert("RGB"))
    except PILLOW_ERRORS:
        raise RejectedImage("corrupt or truncated") from None


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Turn values of more than 8 bits into uint8.

    16-bit values keep their upper 8 bits, unless none is above 255: then a program wrote 8-bit values as 16-bit ones.
    Floats reach to 1, or to 255 if one is above 1.
    """
    top = values.max()
    if values.dtype.kind == "f":
        return np.nan_to_num(values * (255 if top <= 1 else 1)).clip(0, 255).round().astype(np.uint8)
    return (values.astype(np.int64) >> (8 if top > 255 else 0)).clip(0, 255).astype(np.uint8)


def _refuse_huge(height: int, width: int) -> None:
    """Reject an image by the size in its header, before any pixel is decoded."""
    if height * width > MAX_PIXELS:
        raise RejectedImage(HUGE)

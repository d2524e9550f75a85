"""Reads ``.bin`` verification sets (lfw.bin, agedb_30.bin …): pickles of encoded images and flags.

Images are bytes, bytearrays or numpy's bytes; flags are truth values or numbers, of Python or of numpy.
"""

from pathlib import Path

from fr_core.data.pickles import DAMAGES, read_plain_pickle
from fr_core.data.stand_ins import HEAD, stand_in
from fr_core.errors import UserError


def read_bin(path: str | Path) -> tuple[list[bytes], list[bool]]:
    """Read the encoded images of a ``.bin`` set, two for each pair in turn, and whether each pair shows one person.

    Raises:
        UserError: The file is unreadable, damaged, no pickle of images and flags, or a program.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if what := stand_in(data[:HEAD]):
        raise UserError(f"{path}: not a verification set: {what}")
    try:
        content = read_plain_pickle(data)
    except DAMAGES as error:
        raise UserError(f"{path}: not a verification set: {str(error)[:200]}") from None
    if not isinstance(content, tuple | list) or len(content) != 2:
        raise UserError(f"{path}: not a verification set: expected images and flags")
    images, flags = content
    if not isinstance(images, list | tuple) or not all(isinstance(image, bytes) for image in images):
        raise UserError(f"{path}: not a verification set: expected a list of encoded images")
    if not isinstance(flags, list | tuple | bytes) or not all(_is_flag(flag) for flag in flags):
        raise UserError(f"{path}: not a verification set: expected a list of flags")
    if len(images) != 2 * len(flags) or not flags:
        raise UserError(f"{path}: {len(images)} images for {len(flags)} pairs: expected two images for each pair")
    return list(images), [bool(flag) for flag in flags]


def _is_flag(value: object) -> bool:
    """Return whether a value says yes or no; numpy's bytes are numbers."""
    return isinstance(value, int | float) and value in (0, 1)

"""The identities of images in WebDataset tars: files beside the images name them.

``KEY.jpg`` has its identity in ``KEY.cls``, ``KEY.cls.txt``, ``KEY.txt`` or ``KEY.json``. A key may hold dots. A JSON
names the identity by one of the columns that lists have (:data:`fr_core.data.text_tables.IDENTITY_COLUMNS`).
"""

import json
from collections.abc import Sequence
from pathlib import Path

from fr_core.data.archives import Member
from fr_core.data.store import LocalBytes
from fr_core.data.text_tables import IDENTITY_COLUMNS
from fr_core.errors import UserError

BESIDE = (".cls.txt", ".cls", ".json", ".txt")  # the first that a key has counts
LONGEST = {".json": 2**20}  # bytes read of a file beside an image
SHORT = 1000


def labels_beside(
    path: Path, members: Sequence[Member], images: Sequence[Member], in_folders: bool
) -> tuple[list[str] | None, set[str]]:
    """Return the identity of each image, or None if no files beside the images name them, and the names of these files.

    Args:
        path: the tar, to read from.
        members: all its files.
        images: those of them that are images.
        in_folders: images lie in folders of identities, so texts and JSON beside them are about something else.

    Raises:
        UserError: an image has none while others have one, or a file names no identity.
    """
    suffixes = BESIDE[:2] if in_folders else BESIDE
    beside: dict[str, tuple[str, Member]] = {}
    for suffix in suffixes:
        for member in members:
            if member.name.lower().endswith(suffix):
                beside.setdefault(member.name[: -len(suffix)], (suffix, member))
    found = [next((beside[key] for key in keys_of(image.name) if key in beside), None) for image in images]
    if not any(found):
        return None, set()
    data = LocalBytes(path)
    owners, used = [], set()
    for image, label in zip(images, found, strict=True):
        if label is None:
            raise UserError(f"{path}: {image.name} has no .cls or .json beside it, as others have; add it")
        suffix, member = label
        content = bytes(data[member.start : member.start + min(member.length, LONGEST.get(suffix, SHORT))])
        owners.append(_identity(f"{path}: {member.name}", suffix, content))
        used.add(member.name)
    return owners, used


def keys_of(name: str) -> list[str]:
    """Return the keys that an image may have: its path without the last suffix, without the last two, and so on."""
    folder, slash, base = name.rpartition("/")
    parts = base.split(".")
    return [folder + slash + ".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _identity(place: str, suffix: str, content: bytes) -> str:
    """Return the identity that a file names.

    Raises:
        UserError: it names none.
    """
    try:
        text = content.decode()
        fields = json.loads(text) if suffix == ".json" else None
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise UserError(f"{place} is not readable as {'JSON' if suffix == '.json' else 'UTF-8 text'}") from None
    if isinstance(fields, dict):
        name = next((name for name in IDENTITY_COLUMNS if isinstance(fields.get(name), str | int)), None)
        if name is None:
            raise UserError(f"{place} names no identity; its fields are {', '.join(fields)}: rename one to identity")
        return str(fields[name])
    identity = str(fields) if isinstance(fields, str | int) else text.strip()
    if not identity or "\n" in identity or (fields is not None and not isinstance(fields, str | int)):
        raise UserError(f"{place} names no identity; write one name or number into it")
    return identity

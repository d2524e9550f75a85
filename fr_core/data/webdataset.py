"""The identities of images in WebDataset tars: files beside the images name them.

``KEY.jpg`` has its identity in ``KEY.cls``, ``KEY.json`` or another of :data:`BESIDE`. A key may hold dots. A JSON
names the identity by one of the columns that lists have (:data:`fr_core.data.text_tables.IDENTITY_COLUMNS`). Fields may
have names: ``KEY.input.jpg`` and ``KEY.target.cls``. Such a key ends at its first dot, as WebDataset reads it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from fr_core.data.archives import Member
from fr_core.data.store import LocalBytes
from fr_core.data.text_tables import IDENTITY_COLUMNS
from fr_core.errors import UserError

CERTAIN = (".cls.txt", ".cls", ".identity")  # name a person, also of images that lie in folders
BESIDE = (*CERTAIN, ".class", ".label", ".json", ".id", ".txt")  # the first that a key has counts
LABELS = tuple(name for name in IDENTITY_COLUMNS if name not in ("name", "id"))  # these may be the image's own
LONGEST = {".json": 2**20}  # bytes read of a file beside an image
SHORT = 1000
LONGEST_NAME = 6  # words of a person's name in a text, at most; captions have more


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
        UserError: an image has none while others have one, a file names no identity, or two fields may name it.
    """
    suffixes = CERTAIN if in_folders else BESIDE
    beside: dict[str, tuple[str, Member]] = {}
    for suffix in suffixes:
        for member in members:
            if member.name.lower().endswith(suffix):
                beside.setdefault(member.name[: -len(suffix)], (suffix, member))
    found = [next((beside[key] for key in keys_of(image.name) if key in beside), None) for image in images]
    if not any(found) and not in_folders:
        named = _named_fields(path, members, suffixes)
        found = [named.get(_key_and_field(image.name)[0]) for image in images]
    if not any(found):
        return None, set()
    data = LocalBytes(path)
    owners, used = [], set()
    for image, label in zip(images, found, strict=True):
        if label is None:
            beside_others = next(suffix for suffix, _ in filter(None, found))
            raise UserError(f"{path}: {image.name} has no {beside_others} beside it, as others have; add it")
        suffix, member = label
        content = bytes(data[member.start : member.start + min(member.length, LONGEST.get(suffix, SHORT))])
        owners.append(_identity(f"{path}: {member.name}", suffix, content))
        used.add(member.name)
    return owners, used


def refuse_other_labels(
    path: Path, members: Sequence[Member], images: Sequence[Member], owners: Sequence[str | None]
) -> None:
    """Refuse a tar whose folders and JSON files divide the images into other people, as folders of parts do.

    Args:
        path, members, images: as :func:`labels_beside` takes them.
        owners: the folder of each image.

    Raises:
        UserError: the two contradict each other.
    """
    places = {member.name[: -len(".json")]: member for member in members if member.name.lower().endswith(".json")}
    beside = [next((places[key] for key in keys_of(image.name) if key in places), None) for image in images]
    data = LocalBytes(path)
    labels = []
    for member in beside:
        if member is None:
            return
        try:
            fields = json.loads(bytes(data[member.start : member.start + min(member.length, LONGEST[".json"])]))
        except (ValueError, RecursionError):
            return
        values = {name.lower(): value for name, value in fields.items()} if isinstance(fields, dict) else {}
        labels.append(next((str(values[name]) for name in LABELS if name in values), None))
    if None in labels or not 1 < len(set(labels)) < len(labels):
        return
    if len(set(zip(owners, labels, strict=True))) > len(set(owners)):
        raise UserError(
            f"{path}: {images[0].name} lies in a folder of several people, says the JSON beside it: name people in "
            "KEY.cls files, or give --level if folders are people"
        )


def keys_of(name: str) -> list[str]:
    """Return the keys that an image may have: its path without the last suffix, without the last two, and so on."""
    folder, slash, base = name.rpartition("/")
    parts = base.split(".")
    return [folder + slash + ".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _named_fields(path: Path, members: Sequence[Member], suffixes: Sequence[str]) -> dict[str, tuple[str, Member]]:
    """Return the label of each key from the field whose name ends in one of the suffixes, such as ``target.cls``.

    Raises:
        UserError: two fields end in the same suffix.
    """
    fields: dict[str, dict[str, Member]] = {}
    for member in members:
        key, field = _key_and_field(member.name)
        fields.setdefault(field, {})[key] = member
    for suffix in suffixes:
        ending = sorted(field for field in fields if field.endswith(suffix))
        if len(ending) > 1:
            either = f"KEY{ending[0]} or KEY{ending[1]}"
            raise UserError(f"{path}: {either} may name the person; pack one of them as KEY.cls")
        if ending:
            return {key: (suffix, member) for key, member in fields[ending[0]].items()}
    return {}


def _key_and_field(name: str) -> tuple[str, str]:
    """Return WebDataset's key of a file and the name of its field, cut at the first dot behind the folders."""
    folder, slash, base = name.rpartition("/")
    key, dot, field = base.partition(".")
    return folder + slash + key, dot + field.lower()


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
        values = {name.lower(): value for name, value in fields.items()}
        named = next(
            (values[name] for name in IDENTITY_COLUMNS if isinstance(values.get(name), str | int | float)), None
        )
        if named is None:
            raise UserError(f"{place} names no identity; its fields are {', '.join(fields)}: rename one to identity")
        return str(int(named) if isinstance(named, float) and named.is_integer() else named)
    if suffix == ".txt" and len(text.split()) > LONGEST_NAME:
        raise UserError(f"{place} holds a caption, not a person: name the person in KEY.cls, or by a folder")
    identity = str(fields) if isinstance(fields, str | int) else text.strip()
    if not identity or "\n" in identity or (fields is not None and not isinstance(fields, str | int)):
        raise UserError(f"{place} names no identity; write one name or number into it")
    return identity

"""Lists the images of an LMDB, in the forms that people of this field publish. An image is read where it lies.

The key of an entry is the number or the name of the image. Its value is one of:

- msgpack of (image, label), as in HSFace and the sets of SOTA-Face-Recognition-Train-and-Test. Vec2Face's has an
  embedding between the two, others have landmarks or a mask behind them.
- a pickle of the same tuple or of a dict with ``image`` and ``label``, which is parsed and never run.
- Caffe's ``Datum`` with an encoded image.
- the image alone, if its key is a path whose folder names the identity.

Entries such as ``__keys__``, ``__len__`` or ``__index__`` are no images. An entry of another form is a lost image.
"""

from pathlib import PurePosixPath

import msgpack

from fr_core.data.listing import Listing, make_listing
from fr_core.data.lmdb import read_entries
from fr_core.data.photos import LONGEST
from fr_core.data.pickles import DAMAGES, read_plain_pickle
from fr_core.data.protobuf import Span, read_fields, signed
from fr_core.data.store import AnyPath, LocalBytes, find_paths, local_copy
from fr_core.errors import UserError

SUFFIXES = {".lmdb", ".mdb"}
FOLDER_FILE = "data.mdb"  # LMDB's own name for the file, in a folder beside lock.mdb
AROUND = 2**20  # bytes of a value besides its image, at most
DATUM_DATA, DATUM_LABEL = 4, 5  # fields of Caffe's Datum
PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
MSGPACKS = {bytes([first]) for first in (*range(0x81, 0xA0), *range(0xDC, 0xE0))}  # arrays and maps
MAGICS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"BM", b"RIFF")  # of encoded images
FORMS = "msgpack or a pickle of (image, label), a Datum with an encoded image, or an image whose key is PERSON/NAME"


def find_lmdbs(folder: AnyPath) -> list[AnyPath]:
    """Return the LMDB files in a folder, which may be the folder of one of them."""
    if (folder / FOLDER_FILE).is_file():
        return [folder / FOLDER_FILE]
    found = [path for path in find_paths(folder, "*") if path.suffix.lower() in SUFFIXES]
    return [path / FOLDER_FILE if path.is_dir() else path for path in found]


def list_lmdb(path: AnyPath) -> Listing:
    """List the images of an LMDB file; an identity's name is its label.

    Raises:
        UserError: the file is no readable LMDB, or no entry holds an image and a label.
    """
    paths: list[str] = []
    owners: list[str] = []
    places: list[tuple[int, int, int]] = []
    lost: list[tuple[str, str]] = []
    first = "it has no entries"
    try:
        with local_copy(path) as file:
            data = LocalBytes(file)
            for entry in read_entries(data):
                name = entry.key.decode(errors="backslashreplace")
                if name.startswith("__"):
                    continue
                try:
                    if entry.length > LONGEST + AROUND:
                        raise ValueError("too large")
                    start, length, owner = _read_value(name, data[entry.start : entry.start + entry.length])
                except DAMAGES as error:
                    first = f"entry {name} has none: {error}" if not lost else first
                    lost.append((name, "no image and label in its value"))
                    continue
                paths.append(name)
                owners.append(owner)
                places.append((0, entry.start + start, length))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a readable LMDB: {error}") from None
    if not paths:
        raise UserError(f"{path}: no images; {first}; values must be {FORMS}")
    return make_listing(path, "plain", [str(path.resolve())], paths, owners, places, lost)


def _read_value(name: str, value: bytes) -> tuple[int, int, str]:
    """Return where the image of a value begins, how long it is, and its identity.

    Raises:
        DAMAGES: the value has none of the known forms.
    """
    if value.startswith(MAGICS):
        if "/" not in name.strip("/"):
            raise ValueError("an image without a label")
        return 0, len(value), PurePosixPath(name).parent.name
    if value.startswith(PICKLES):
        content = read_plain_pickle(value)
    elif value[:1] in MSGPACKS:
        content = msgpack.unpackb(value, strict_map_key=False, unicode_errors="surrogateescape")
    else:
        return _read_datum(value)
    image: object = None
    rest: list[object] = []
    if isinstance(content, dict):
        image, rest = content.get("image"), [content.get("label")]
    elif isinstance(content, list | tuple) and content:
        image, *rest = content
    if isinstance(image, list | tuple) and len(image) == 1:  # PyTorch's loader makes a batch of one
        image = image[0]
    if isinstance(image, str):  # msgpack of before 2013 has one type for bytes and texts
        image = image.encode(errors="surrogateescape")
    labels = [label for label in rest if isinstance(label, int | str) and not isinstance(label, bool)]
    labels.sort(key=lambda label: isinstance(label, str))  # a number before a text
    if not isinstance(image, bytes) or not image or not labels:
        raise ValueError("no bytes and label")
    start = value.find(image)
    if start < 0:
        raise ValueError("a pickle of before protocol 3, which re-encodes the image")
    return start, len(image), str(labels[0])


def _read_datum(value: bytes) -> tuple[int, int, str]:
    """Return where the image of Caffe's Datum begins, how long it is, and its identity."""
    fields = dict(read_fields(value, Span(0, len(value))))
    match fields.get(DATUM_DATA), fields.get(DATUM_LABEL, 0):
        case Span() as data, int(label):
            if not value[data.start : data.end].startswith(MAGICS):
                raise ValueError("a Datum of raw pixels; write it with convert_imageset --encoded")
            return data.start, data.end - data.start, str(signed(label))
    raise ValueError("another form")

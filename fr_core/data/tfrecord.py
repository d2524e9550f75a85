"""Reads TFRecord files of ``tf.train.Example`` without TensorFlow. An image is read where it lies.

A record is a length, the length's checksum, an Example and its checksum. An Example is a map from names to lists of
bytes, floats or integers. Of the checksums the first is verified: it tells a record from other bytes.

TFace's Examples hold images alone. A line of its training list tells an image's set, file, offset and label. TFace's
writer leaves ``NAME.index``, with the path of the source image instead of the set, and without the label. Without a
list, the folder in that path names the identity.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from fr_core.data.listing import Listing, make_listing
from fr_core.data.photos import LONGEST
from fr_core.data.protobuf import Span, read_fields, read_varint, signed
from fr_core.data.recordio import CUT_OFF
from fr_core.data.store import AnyPath, LocalBytes, local_copy
from fr_core.errors import UserError

HEAD = struct.Struct("<QI")  # length of the Example, checksum of the length
TAIL = 4  # bytes of the Example's checksum
AROUND = 2**20  # bytes of an Example besides its image, at most
IMAGE_FEATURES = ("image", "image_raw", "image/encoded", "img", "jpeg", "image_bytes")
LABEL_FEATURES = ("label", "identity", "class", "image/class/label", "image/source_id")
NAME_FEATURES = ("image/filename", "filename", "path")
FEATURES, FEATURE, KEY, VALUE = 1, 1, 1, 2  # fields on the way from an Example to a Feature
BYTES_LIST, INT64_LIST, ITEM = 1, 3, 1  # fields in a Feature
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x78\x01": "zlib", b"\x78\x5e": "zlib", b"\x78\x9c": "zlib", b"\x78\xda": "zlib"}
LONGEST_LINE, LONGEST_NUMBER, LONGEST_NAME = 10_000, 19, 200  # characters in a list
CASTAGNOLI = 0x82F63B78  # polynomial of CRC-32C, its bits reversed


@dataclass
class _Images:
    """The images found so far."""

    paths: list[str] = field(default_factory=list)
    owners: list[str] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)

    def add(self, number: int, data: LocalBytes, record: Span, name: str, owner: str | None = None) -> None:
        """Add the image of a record.

        Args:
            number: of the file.
            data: the file's bytes.
            record: place of the Example.
            name: of the image, if the Example does not name it.
            owner: identity of the image; by default the Example's label.
        """
        if record.end - record.start > LONGEST + AROUND:
            self.lost.append((name, "too large"))
            return
        example = data[record.start : record.end]
        try:
            features = read_example(example)
        except ValueError:
            features = {}
        image = next((features[key] for key in IMAGE_FEATURES if isinstance(features.get(key), Span)), None)
        owner = owner or _text(example, features, LABEL_FEATURES)
        if not isinstance(image, Span) or owner is None:
            self.lost.append((name, "no image in its record" if owner else "no label in its record"))
            return
        self.paths.append(_text(example, features, NAME_FEATURES) or name)
        self.owners.append(owner)
        self.places.append((number, record.start + image.start, image.end - image.start))

    def list(self, root: AnyPath, files: Sequence[AnyPath]) -> Listing:
        """Make the listing of all images."""
        if not self.paths:
            name, reason = self.lost[0] if self.lost else (files[0].name, "no records")
            raise UserError(
                f"{root}: no images: {name}: {reason}; an Example needs one of {', '.join(IMAGE_FEATURES)} and one of "
                f"{', '.join(LABEL_FEATURES)}, or TFace's list: --labels LIST"
            )
        names = [str(file.resolve()) for file in files]
        return make_listing(root, "plain", names, self.paths, self.owners, self.places, self.lost)


def is_tfrecord(path: AnyPath) -> bool:
    """Return whether a name has the suffix of a TFRecord file, such as in ``train.tfrecord-00000-of-00010``."""
    return any(suffix.lower().startswith(".tfrecord") for suffix in path.suffixes)


def is_tface_list(table: AnyPath) -> bool:
    """Return whether the first line of a list is one of TFace's: a name, two numbers and a label."""
    try:
        with local_copy(table) as file, file.open(errors="replace") as lines:
            return _row_of(lines.readline(LONGEST_LINE), 4) is not None
    except OSError:
        return False


def list_tfrecords(root: AnyPath, files: Sequence[AnyPath]) -> Listing:
    """List the images in TFRecord files, by the labels in their Examples or by TFace's index beside them.

    Raises:
        UserError: a file is unreadable, compressed, damaged or no TFRecord, or no record has an image and a label.
    """
    found = _Images()
    for number, path in enumerate(files):
        with local_copy(path) as file:
            data = LocalBytes(file)
            for start, record in _scan(path, data):
                name = f"{path.name}:{start}"
                if record:
                    found.add(number, data, record, name)
                else:
                    found.lost.append((name, CUT_OFF))
    index = files[0].parent / f"{files[0].parent.name}.index"
    if not found.paths and index.is_file():
        return _list_places(index, files[0].parent, _read_index(index))
    return found.list(root, files)


def list_tface(table: AnyPath, root: AnyPath) -> Listing:
    """List the images of TFace's training list.

    Args:
        table: the list.
        root: the folder of the sets' folders, or a set's folder.

    Raises:
        UserError: a line of the list has another form, or a file is missing, unreadable or another one.
    """
    return _list_places(table, root, _read_index(table, labelled=True))


def read_example(example: bytes) -> dict[str, Span | int]:
    """Read the first item of each feature of an Example: an integer, or the place of bytes. Floats are left out.

    Raises:
        ValueError: the bytes are no Example.
    """
    items: dict[str, Span | int] = {}
    for features in _spans(example, Span(0, len(example)), FEATURES):
        for feature in _spans(example, features, FEATURE):
            entry = dict(read_fields(example, feature))
            match entry.get(KEY), entry.get(VALUE):
                case Span() as name, Span() as value:
                    if (item := _first_item(example, value)) is not None:
                        items[_decode(example, name)] = item
    return items


def _spans(data: bytes, span: Span, wanted: int) -> Iterator[Span]:
    """Yield the places of the fields of one number that hold bytes."""
    return (value for number, value in read_fields(data, span) if number == wanted and isinstance(value, Span))


def _first_item(example: bytes, value: Span) -> Span | int | None:
    """Return the first item of a Feature that lists bytes or integers, packed or not."""
    for kind, items in read_fields(example, value):
        if kind not in (BYTES_LIST, INT64_LIST) or not isinstance(items, Span):
            continue
        for number, item in read_fields(example, items):
            if number != ITEM:
                continue
            if kind == INT64_LIST and isinstance(item, int):
                return signed(item)
            if kind == INT64_LIST and isinstance(item, Span) and item.start < item.end:
                return signed(read_varint(example, item.start, item.end)[0])
            if kind == BYTES_LIST and isinstance(item, Span):
                return item
    return None


def _decode(data: bytes, span: Span) -> str:
    """Return the text at a place."""
    return data[span.start : span.end].decode(errors="replace")


def _text(example: bytes, features: dict[str, Span | int], known: Sequence[str]) -> str | None:
    """Return the first known feature that is there, as text."""
    found = next((features[key] for key in known if key in features), None)
    return _decode(example, found) if isinstance(found, Span) else None if found is None else str(found)


def _scan(path: AnyPath, data: LocalBytes) -> Iterator[tuple[int, Span | None]]:
    """Yield the offset of each record of a file and the place of its Example; None if the file ends inside it."""
    start = 0
    while start < len(data):
        try:
            record = _record_at(data, start)
        except ValueError:
            packed = COMPRESSED.get(data[:2]) if start == 0 else None
            if packed:
                raise UserError(f"{path}: compressed by {packed}; decompress it first") from None
            raise UserError(
                f"{path}: no record at byte {start}; not TFRecord, or damaged: copy the file again"
            ) from None
        yield start, record
        if record is None:
            return
        start = record.end + TAIL


def _record_at(data: LocalBytes, start: int) -> Span | None:
    """Return the place of the Example in the record at an offset, or None if the file ends inside the record.

    Raises:
        ValueError: the checksum of the length is wrong.
    """
    head = data[start : start + HEAD.size]
    if len(head) < HEAD.size:
        return None
    length, checksum = HEAD.unpack(head)
    if masked_crc(head[:8]) != checksum:
        raise ValueError("no record")
    begin = start + HEAD.size
    return Span(begin, begin + length) if begin + length + TAIL <= len(data) else None


def _row_of(line: str, columns: int) -> list[str] | None:
    """Return the columns of a line of TFace's, None if it has another form."""
    row = line.rstrip("\r\n").split("\t")
    numbers = all(text.isascii() and text.isdigit() and len(text) < LONGEST_NUMBER for text in row[1:])
    return row if len(row) == columns and numbers and len(row[0]) < LONGEST_LINE else None


def _read_index(table: AnyPath, labelled: bool = False) -> dict[tuple[str, str], list[tuple[int, str, str]]]:
    """Read TFace's training list, or the index that its writer leaves.

    Returns:
        For each file, by the name of its set and its own name: the offset of each record, its identity and its name.
    """
    rows: dict[tuple[str, str], list[tuple[int, str, str]]] = {}
    form = "NAME, FILE, OFFSET and LABEL" if labelled else "PERSON/IMAGE, FILE and OFFSET"
    try:
        with local_copy(table) as local, local.open() as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = _row_of(line, 4 if labelled else 3)
                name = row[0] if row and labelled else table.stem
                owner = row[3] if row and labelled else PurePosixPath(row[0]).parent.name if row else ""
                if not row or not owner or "/" in name or name in ("", ".", "..") or len(name) > LONGEST_NAME:
                    raise UserError(f"{table}: line {number}: expected {form} with tabs between them")
                file = f"{name}-{int(row[1]):05d}.tfrecord"
                called = f"{file}:{row[2]}" if labelled else row[0]
                rows.setdefault((name, file), []).append((int(row[2]), owner, called))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{table}: {error}") from None
    return rows


def _list_places(table: AnyPath, root: AnyPath, rows: dict[tuple[str, str], list[tuple[int, str, str]]]) -> Listing:
    """List the images of the records that TFace's list or index names."""
    found, files = _Images(), []
    for number, ((name, called), records) in enumerate(sorted(rows.items())):
        path = next((path for path in (root / name / called, root / called) if path.is_file()), None)
        if path is None:
            raise UserError(f"{table}: {root / name / called} is missing; give the folder that holds {name}/{called}")
        files.append(path)
        with local_copy(path) as file:
            data = LocalBytes(file)
            for start, owner, image in records:
                try:
                    record = _record_at(data, start)
                except ValueError:
                    found.lost.append((image, "no record at its place"))
                    continue
                if record:
                    found.add(number, data, record, image, owner)
                else:
                    found.lost.append((image, CUT_OFF))
    if not files:
        raise UserError(f"{table}: names no images")
    return found.list(table, files)


def _crc_table() -> list[int]:
    """Return CRC-32C of each byte."""
    table = list(range(256))
    for _ in range(8):
        table = [crc >> 1 ^ (CASTAGNOLI if crc & 1 else 0) for crc in table]
    return table


CRC_TABLE = _crc_table()


def masked_crc(data: bytes) -> int:
    """Return TFRecord's checksum: CRC-32C, rotated and shifted by a constant."""
    crc = 2**32 - 1
    for byte in data:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 0xFF]
    crc ^= 2**32 - 1
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & (2**32 - 1)

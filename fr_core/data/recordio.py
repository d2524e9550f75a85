"""MXNet's RecordIO, the format of insightface's training sets: ``train.rec``, ``train.idx``, ``property``.

A record is a magic number, a length word and a payload padded to four bytes. The word has 3 bits that mark parts of a
longer record, and 29 bits of length. Writers cut a payload at every magic number inside it; readers put it back.

The payload of an image is a header and a JPEG or PNG. The header is flag, label and two ids, followed by ``flag``
further labels. Record 0 has two labels and no image: the range of the identities' records. Each identity's record also
has two labels and no image: the range of its images.

A file that was cut off lacks records at its end. Its index, or else record 0, says which ones were images.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fr_core.data.store import LocalBytes, RemoteBytes
from fr_core.errors import UserError

MAGIC = 0xCED7230A
MAGIC_BYTES = MAGIC.to_bytes(4, "little")
WHOLE, FIRST, MIDDLE, LAST = range(4)  # values of the 3 bits
HEADER = np.dtype([("flag", "<u4"), ("label", "<f4"), ("id", "<u8"), ("id2", "<u8")])
FRAME = 8  # bytes of magic number and length word
CUT_OFF = "the file ends inside a record"


@dataclass(frozen=True)
class Records:
    """The images of a ``.rec``. Legend: I images."""

    keys_I: np.ndarray  # int64, numbers of the records in the index
    starts_I: np.ndarray  # int64, offsets in the file
    labels_I: np.ndarray  # int64, labels in the file
    lost_keys: np.ndarray  # int64, numbers of the images behind the end of a file that was cut off


def list_records(path: Path) -> Records:
    """Find the images of a ``.rec`` and their labels, by its ``.idx`` or, without one, by scanning the file.

    Raises:
        UserError: the file is unreadable or no RecordIO, has no images, or has a label that is no whole number. Also
            if the index belongs to another file, contradicts itself or lacks records, or if most images are cut off.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    index = path.with_suffix(".idx")
    indexed = index.is_file()
    keys, starts = _read_index(index) if indexed else _scan_records(path, data)
    inside = starts <= len(data) - FRAME - HEADER.itemsize
    end_of_known = starts[~inside].min(initial=len(data))
    behind, keys, starts = keys[~inside], keys[inside], starts[inside]
    if not len(starts):
        raise UserError(f"{path}: no records; the file is empty or truncated")
    fixed = _gather(data, starts, FRAME + HEADER.itemsize)
    if (np.ascontiguousarray(fixed[:, :4]).view("<u4")[:, 0] != MAGIC).any():
        raise UserError(
            f"{path}: no record where {index.name} has one; not RecordIO, or an index of another file: copy both again"
        )
    header = np.ascontiguousarray(fixed[:, FRAME:]).view(HEADER)[:, 0]
    words = np.ascontiguousarray(fixed[:, 4:FRAME]).view("<u4")[:, 0]
    if indexed:
        _refuse_gaps(index, data[:end_of_known], starts, words)
    images = (header["flag"] != 2) | (words != HEADER.itemsize + 8)  # not a record of two labels alone
    labels = header["label"].astype(np.float64)
    several = np.flatnonzero(images & (header["flag"] > 0))
    labels[several], cut = _first_labels(data, starts[several])
    end = np.inf if images[0] else _first_labels(data, starts[:1])[0][0]
    images[several[cut]] = False
    lost = np.append(keys[several[cut]], behind)
    if not indexed and np.isfinite(end):
        lost = np.append(lost, _keys_behind(path, len(keys) + len(behind), end))
    keys, starts, labels = keys[images], starts[images], labels[images]
    if not len(keys):
        raise UserError(f"{path}: none of its {len(images)} records is an image")
    if (wrong := ~(np.isfinite(labels) & (labels == np.round(labels)) & (np.abs(labels) < 2**53))).any():
        raise UserError(f"{path}: record {keys[wrong][0]} has label {labels[wrong][0]:g}; labels must be whole numbers")
    return Records(keys, starts, labels.astype(np.int64), lost[lost < end])


def read_record(data: memoryview | LocalBytes | RemoteBytes, start: int, longest: int) -> bytes:
    """Read the payload of the record at ``start`` and join its parts.

    Args:
        data: bytes of the file.
        start: offset of the record.
        longest: limit in bytes; longer payloads are refused.

    Raises:
        ValueError: there is no complete record.
    """
    parts: list[bytes] = []
    size = 0
    while True:
        frame = bytes(data[start : start + FRAME])
        if frame[:4] != MAGIC_BYTES or len(frame) < FRAME:
            raise ValueError("no record")
        word = int.from_bytes(frame[4:], "little")
        part, length = word >> 29, word & (2**29 - 1)
        size += length + len(MAGIC_BYTES)
        payload = bytes(data[start + FRAME : start + FRAME + length]) if size <= longest else b""
        if start + FRAME + length > len(data):
            raise ValueError(CUT_OFF)
        if len(payload) < length or part not in ((FIRST, WHOLE) if not parts else (MIDDLE, LAST)):
            raise ValueError("broken record")
        parts.append(payload)
        if part in (WHOLE, LAST):
            return MAGIC_BYTES.join(parts)
        start += FRAME + -(-length // 4) * 4


def image_of(payload: bytes) -> bytes:
    """Return the image in a payload.

    Raises:
        ValueError: the payload is shorter than its header says.
    """
    if len(payload) < HEADER.itemsize:
        raise ValueError("short record")
    flag = int.from_bytes(payload[:4], "little")
    begin = HEADER.itemsize + 4 * flag
    if begin > len(payload):
        raise ValueError("short record")
    return payload[begin:]


def _read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the keys and starts of an index, in the order of the keys. Lines that occur twice count once."""
    try:
        if path.stat().st_size == 0:
            raise ValueError("empty")
        table = np.loadtxt(path, np.int64, ndmin=2)
        if table.size and table.shape[1] != 2:
            raise ValueError("expected two numbers per line")
        if table.size and table[:, 1].min() < 0:
            raise ValueError("a record begins before the file")
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    table = table.reshape(-1, 2)
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    table = table[np.append(True, np.diff(table, axis=0).any(axis=1))[: len(table)]]
    keys, starts = table.T
    in_file = np.argsort(starts, kind="stable")
    if (twice := np.flatnonzero(np.diff(keys) == 0)).size:
        raise UserError(f"{path}: record {keys[twice[0]]} begins at two bytes; make the index anew, or remove it")
    if (twice := np.flatnonzero(np.diff(starts[in_file]) == 0)).size:
        first, second = keys[in_file[twice[0] : twice[0] + 2]]
        raise UserError(f"{path}: records {first} and {second} begin at one byte; make the index anew, or remove it")
    return keys, starts


def _refuse_gaps(index: Path, data: np.ndarray, starts: np.ndarray, words: np.ndarray) -> None:
    """Refuse an index that lacks records of its file, as one that was cut off does.

    Args:
        index: the index, for the message.
        data: bytes of the file, up to a record that was cut off.
        starts: offsets of the records before it that the index lists.
        words: their length words. The end of a record in parts is not looked for.

    Raises:
        UserError: another record begins where a listed one ends.
    """
    order = np.argsort(starts)
    begins, words = starts[order], words[order].astype(np.int64)
    whole = words >> 29 == WHOLE
    ends = np.append(0, (begins + FRAME + -(-words // 4) * 4)[whole])
    nexts = np.append(begins[:1], np.append(begins[1:], len(data))[whole])
    gaps = ends[(ends < nexts) & (ends <= len(data) - FRAME)]
    another = np.ascontiguousarray(_gather(data, gaps, 4)).view("<u4")[:, 0] == MAGIC
    if another.any():
        where = gaps[another][0]
        raise UserError(f"{index}: lacks the record at byte {where}: copy it again, or remove it: it is not needed")


def _keys_behind(path: Path, count: int, end: float) -> np.ndarray:
    """Return the numbers of the images that a file of ``count`` records lacks, if record 0 says they end at ``end``."""
    if end <= count + np.spacing(np.float32(end)):  # labels are float32, which rounds above 16.8 million
        return np.arange(0)
    if end > 2 * count:
        raise UserError(f"{path}: cut off: {count} of {end:.0f} records are left; copy the file again")
    return np.arange(count, int(end))


def _scan_records(path: Path, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the records of a file without an index; return keys, counted from 0, and starts, also of one cut off."""
    view, starts, start = memoryview(data), [], 0  # type: ignore[arg-type]
    while start < len(view):
        if start + FRAME > len(view):
            starts.append(start)
            break
        magic, word = np.frombuffer(view[start : start + FRAME], "<u4").tolist()
        if magic != MAGIC:
            raise UserError(f"{path}: no record at byte {start}; not RecordIO, or damaged: copy the file again")
        if word >> 29 in (WHOLE, FIRST):
            starts.append(start)
        start += FRAME + -(-(word & (2**29 - 1)) // 4) * 4
    return np.arange(len(starts)), np.array(starts, np.int64)


def _gather(data: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Copy ``length`` bytes from each start: uint8 [starts, length]."""
    return np.lib.stride_tricks.sliding_window_view(data, length)[starts]


def _first_labels(data: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read the first label after each header: float64, NaN if the file ends before it; and whether it does."""
    inside = starts + FRAME + HEADER.itemsize + 4 <= len(data)
    labels = np.full(len(starts), np.nan)
    found = _gather(data, starts[inside] + FRAME + HEADER.itemsize, 4)
    labels[inside] = np.ascontiguousarray(found).view("<f4")[:, 0]
    return labels, ~inside

"""Packed sources as other programs write them: RecordIO, zip, tar."""

import io
import struct
import tarfile
import zipfile

import numpy as np

from fr_core.data.listing import read_image

MAGIC = struct.pack("<I", 0xCED7230A)


def frame(part, data):
    return MAGIC + struct.pack("<I", part << 29 | len(data)) + data + bytes(-len(data) % 4)


def record(payload):
    """As dmlc-core's writer: cut at every magic number that begins at a multiple of four bytes."""
    cuts = [i for i in range(0, len(payload) - 3, 4) if payload[i : i + 4] == MAGIC]
    parts, begin = [], 0
    for cut in cuts:
        parts.append(payload[begin:cut])
        begin = cut + 4
    parts.append(payload[begin:])
    if len(parts) == 1:
        return frame(0, payload)
    kinds = [1, *[2] * (len(parts) - 2), 3]
    return b"".join(frame(kind, part) for kind, part in zip(kinds, parts, strict=True))


def payload(image, label, number, more=()):
    labels = struct.pack(f"<{len(more)}f", *more)
    return struct.pack("<IfQQ", len(more), label, number, 0) + labels + image


def write_rec(path, payloads, index=True):
    starts = np.cumsum([0, *(len(record(p)) for p in payloads)])
    path.write_bytes(b"".join(record(p) for p in payloads))
    if index:
        path.with_suffix(".idx").write_text("".join(f"{i}\t{s}\n" for i, s in enumerate(starts[:-1])))
    return path


def make_zip(path, files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def make_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def content(listing):
    """identity -> its images' bytes, in order."""
    found = {}
    for row in listing.images.to_pylist():
        data = read_image(listing.kind, listing.files[row["file"]], row["path"], row["start"], row["length"])
        found.setdefault(listing.names[row["label"]], []).append(data)
    return found


def files_of(photos, prefix):
    return {f"{prefix}{p.relative_to(photos)}": p.read_bytes() for p in sorted(photos.rglob("*.jpg"))}

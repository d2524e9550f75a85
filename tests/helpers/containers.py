"""More packed sources as other programs write them: LMDB, TFRecord, Hugging Face's ``save_to_disk``."""

import json
import struct

import lmdb
import msgpack
import numpy as np
import pyarrow as pa

from fr_core.data.listing import read_image
from fr_core.data.tfrecord import masked_crc


def labelled_images(listing):
    """The identity and the bytes of each image, sorted."""
    return sorted(
        (
            listing.names[row["label"]],
            read_image(listing.kind, listing.files[row["file"]], row["path"], row["start"], row["length"]),
        )
        for row in listing.images.to_pylist()
    )


def write_lmdb(path, entries, commits=2, subdir=False):
    """Written in several transactions, so that pages are used again."""
    with lmdb.open(str(path), subdir=subdir, map_size=2**28) as env:
        for part in range(commits):
            with env.begin(write=True) as transaction:
                for key, value in list(entries.items())[part::commits]:
                    transaction.put(key, value)
    return path


def msgpack_entries(images, more=()):
    """As SOTA-Face-Recognition-Train-and-Test writes them; as Vec2Face, with ``more`` between image and label."""
    entries = {b"%d" % i: msgpack.dumps((image, *more, label)) for i, (image, label) in enumerate(images)}
    counted = {
        b"__keys__": list(entries),
        b"__len__": len(entries),
        b"__classnum__": len({label for _, label in images}),
    }
    return entries | {key: msgpack.dumps(value) for key, value in counted.items()}


def varint(value):
    value %= 2**64
    data = b""
    while value >= 0x80:
        data += bytes([value & 0x7F | 0x80])
        value >>= 7
    return data + bytes([value])


def proto(number, value):
    """A field of a protocol buffer: bytes, or an integer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def example(packed=True, **features):
    """A ``tf.train.Example`` of bytes, integers and floats. Names are written with ``__`` for a slash."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, bytes):
            feature = proto(1, proto(1, value))
        elif isinstance(value, float):
            feature = proto(2, proto(1, struct.pack("<f", value)))
        else:
            feature = proto(3, proto(1, varint(value)) if packed else proto(1, value))
        entries += proto(1, proto(1, name.replace("__", "/").encode()) + proto(2, feature))
    return proto(1, entries)


def tf_record(data):
    head = struct.pack("<Q", len(data))
    return head + struct.pack("<I", masked_crc(head)) + data + struct.pack("<I", masked_crc(data))


def write_tfrecord(path, examples):
    """Returns the offset of each record."""
    records = [tf_record(data) for data in examples]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(records))
    return np.cumsum([0, *map(len, records)])[:-1].tolist()


def save_to_disk(folder, tables, info):
    """As Hugging Face's library does: Arrow streams, named by ``state.json``, described by ``dataset_info.json``."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pa.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table, max_chunksize=4)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder

"""Parquet files of other programs, such as exports of the Hugging Face hub. They are unpacked once.

A Parquet reader cannot read a row without its whole row group, but an ingest reads rows in random order. So each file
is read once from start to end. Its image bytes go to a scratch file, with an index of their positions.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fr_core.data.photos import LONGEST
from fr_core.data.store import AnyPath, local_copy
from fr_core.errors import UserError

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "face", "bytes")
IDENTITY_COLUMNS = ("identity", "label", "name", "class", "cls", "person", "subject")
ROWS = 256  # rows in memory at a time


def unpack_parquet(path: AnyPath, out: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Write the images of a file one after the other into ``out``, unless an earlier call did.

    The image column is one of :data:`IMAGE_COLUMNS`. It holds bytes, or structs with ``bytes`` and optionally ``path``.
    The identity column is one of :data:`IDENTITY_COLUMNS`. Hugging Face metadata may name its classes.

    Returns:
        The name of each image, its identity, and int64 [images, 2]: start and length in ``out``.

    Raises:
        UserError: the file is unreadable, lacks these columns, or has a row without identity.
    """
    index = out.with_suffix(".index")
    try:
        facts = path.stat()
        source = f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode()
        if not index.is_file() or pq.read_schema(index).metadata[b"source"] != source:
            with local_copy(path) as local:
                _unpack(local, out, index, source)
        table = pq.read_table(index)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None
    places = np.column_stack([table["start"].to_numpy(), table["length"].to_numpy()])
    return table["path"].to_pylist(), table["identity"].to_pylist(), places


def _unpack(path: Path, out: Path, index: Path, source: bytes) -> None:
    """Write a file's images to ``out`` and the index of their positions to ``index``."""
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        image, identity = _column(path, schema, IMAGE_COLUMNS), _column(path, schema, IDENTITY_COLUMNS)
        names = _class_names(schema, identity)
        paths: list[str] = []
        owners: list[str] = []
        lengths: list[int] = []
        with out.open("wb") as scratch:
            for batch in file.iter_batches(ROWS, columns=[image, identity]):
                for row in batch.to_pylist():
                    called, data = _image(row[image])
                    if data is None or len(data) > LONGEST:
                        data = b""  # read_image rejects an empty image
                    scratch.write(data)
                    paths.append(called or f"{path.name}:{len(paths)}")
                    owners.append(_name(path, len(owners), row[identity], names))
                    lengths.append(len(data))
    ends = np.cumsum(lengths, dtype=np.int64)
    columns = {"path": paths, "identity": owners, "start": ends - lengths, "length": np.array(lengths, np.int64)}
    part = index.with_suffix(".part")
    pq.write_table(pa.table(columns).replace_schema_metadata({b"source": source}), part)
    part.replace(index)


def _column(path: Path, schema: pa.Schema, known: Sequence[str]) -> str:
    """Return the first known column of a file; the case of its name does not matter."""
    lower = {name.lower(): name for name in schema.names}
    found = next((lower[name] for name in known if name in lower), None)
    if found is None:
        raise UserError(
            f"{path}: none of the columns {', '.join(known)}; rename one of its columns {', '.join(schema.names)}"
        )
    return found


def _class_names(schema: pa.Schema, identity: str) -> list[str] | None:
    """Return the names of numbered classes from the metadata of the Hugging Face library, if there are any."""
    try:
        told = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][identity]["names"]
        return [str(name) for name in told]
    except (KeyError, TypeError, ValueError):
        return None


def _image(value: object) -> tuple[str | None, bytes | None]:
    """Return the name and the bytes of an image cell, each None if it is not given."""
    if isinstance(value, dict):
        called, value = value.get("path"), value.get("bytes")
        return (called if isinstance(called, str) else None), (value if isinstance(value, bytes) else None)
    return None, value if isinstance(value, bytes) else None


def _name(path: Path, row: int, value: object, names: list[str] | None) -> str:
    """Return the name of a row's identity."""
    if value is None or value == "":
        raise UserError(f"{path}: row {row} has no identity; give it one or remove the row")
    if names and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    return str(value)

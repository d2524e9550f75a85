"""Unpacks tables of images: Parquet, and Arrow files in both of their forms, stream and file.

A reader cannot read a row without its whole row group or batch, but an ingest reads rows in random order. So each
table is read once from start to end. Its image bytes go to a scratch file, with an index of their positions.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fr_core.data.photos import LONGEST
from fr_core.data.store import AnyPath, RemotePath, local_copy
from fr_core.data.text_tables import IDENTITY_COLUMNS
from fr_core.errors import UserError

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "face", "bytes", "file_name", "image_path", "path")
ROWS = 256  # rows in memory at a time
OTHERS = set(IDENTITY_COLUMNS) - {"id"}  # columns that may name people, too; an id may be the image's
NOTE = b"note"  # key of an index's metadata
FILE_START, STREAM_END = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow's two forms
BOMB = 100  # a table may unpack to this many times its size; images do not compress further
BOMB_SIZE = 2**30  # bytes that any table may unpack to
LONGEST_PATH = 1000  # letters; a longer text is an image in base64
ROW_SIZE = 100  # bytes that each row counts for


@dataclass
class _Rows:
    """The columns of an index, one row for each row of the table."""

    path: list[str] = field(default_factory=list)  # name of the image
    identity: list[str] = field(default_factory=list)
    start: list[int] = field(default_factory=list)  # offset in the file
    length: list[int] = field(default_factory=list)  # bytes
    file: list[str | None] = field(default_factory=list)  # None for the scratch file
    lost: list[str | None] = field(default_factory=list)  # why there is no image
    note: str = ""  # which of several columns names the people

    def table(self, source: bytes) -> pa.Table:
        """Return the index; its metadata tells the source, and the note."""
        columns = {name: values for name, values in vars(self).items() if name != "note"}
        kinds = (pa.string(), pa.string(), pa.int64(), pa.int64(), pa.string(), pa.string())
        arrays = {name: pa.array(values, kind) for (name, values), kind in zip(columns.items(), kinds, strict=True)}
        return pa.table(arrays).replace_schema_metadata({b"source": source, NOTE: self.note.encode()})


def unpack_table(path: AnyPath, out: Path, root: AnyPath) -> pa.Table:
    """Write the images of a table one after the other into ``out``, unless an earlier call did.

    The image column is one of :data:`IMAGE_COLUMNS`. It holds bytes, paths, or structs with ``bytes`` and ``path``.
    The identity column is one of those of lists. Hugging Face's metadata may name its classes.

    Args:
        path: the table.
        out: the scratch file; the index is written beside it.
        root: folder of the source. A path leads to a file beside the table or below this folder.

    Returns:
        The index: ``path``, ``identity``, ``start``, ``length`` of each image, ``file``, which is null for ``out``, and
        ``lost``, the reason why a row has no image. Its metadata holds a note for the user.

    Raises:
        UserError: the table is unreadable, lacks these columns, or has a row without identity.
    """
    index = out.with_suffix(".index")
    try:
        facts = path.stat()
        source = f"{path.resolve()} {root.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode()
        if index.is_file() and pq.read_schema(index).metadata[b"source"] == source:
            return pq.read_table(index)
        with local_copy(path) as local:
            rows = _unpack(path, local, out, root)
        table = rows.table(source)
        part = index.with_suffix(".part")
        pq.write_table(table, part)
        part.replace(index)
        return table
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        kind = "Arrow" if path.suffix.lower() == ".arrow" else "Parquet"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a readable {kind} file: {reason}") from None


def _unpack(path: AnyPath, local: Path, out: Path, root: AnyPath) -> _Rows:
    """Write a table's images to ``out``."""
    rows = _Rows()
    end, most = 0, BOMB_SIZE + BOMB * local.stat().st_size
    with _open_table(local) as (schema, read), out.open("wb") as scratch:
        image, identity = (_column(path, schema, known) for known in (IMAGE_COLUMNS, IDENTITY_COLUMNS))
        _check_types(path, schema, image, identity)
        others = [name for name in schema.names if name.lower() in OTHERS and name != identity]
        if others:
            rows.note = f"people are the column {identity}, not {' or '.join(others)}: rename the right one to identity"
        names = _class_names(schema, identity, {path.parent, root})
        for batch in read(image, identity):
            for cell, value in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                if value is None or value == "":
                    raise UserError(f"{path}: row {len(rows.path)} has no identity; give it one or remove the row")
                owner = _name(value, names)
                called, data = _parts(cell)
                file, length, lost = None, 0, None
                if called and len(called) > LONGEST_PATH:
                    called, lost = None, "a text that is no path: decode it to bytes"
                elif data is None and called:
                    file, length, lost = _find_image(called, path.parent, root)
                elif data is None:
                    lost = "no image"
                elif len(data) > LONGEST:
                    lost = "too large"
                else:
                    length = scratch.write(data)
                rows.path.append(called or f"{path.name}:{len(rows.path)}")
                rows.identity.append(owner or "")
                rows.start.append(0 if file else end)
                rows.length.append(length)
                rows.file.append(file)
                rows.lost.append(lost if owner else "no identity")
                end += 0 if file else length
                if end + ROW_SIZE * len(rows.path) > most:
                    raise UserError(f"{path}: unpacks to more than {BOMB} times its size; no table of images")
    return rows


@contextmanager
def _open_table(path: Path) -> Iterator[tuple[pa.Schema, Callable[[str, str], Iterator[pa.RecordBatch]]]]:
    """Open a table; provide its schema, and what reads two of its columns in small batches."""
    if path.suffix.lower() == ".parquet":
        with pq.ParquetFile(path) as file:
            yield (
                file.schema_arrow,
                lambda *names: (batch.select(names) for batch in file.iter_batches(ROWS, columns=names)),
            )
        return
    with pa.memory_map(str(path)) as file:
        if file.read(len(FILE_START)) == FILE_START:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            file.seek(max(0, file.size() - len(STREAM_END)))
            if file.read() != STREAM_END:  # a reader takes a file that ends between two batches for a whole one
                raise ValueError("no end mark: cut off, or no Arrow file; copy it again")
            file.seek(0)
            batches = reader = pa.ipc.open_stream(file)
        yield reader.schema, lambda *names: _small_batches(batches, [reader.schema.names.index(name) for name in names])


def _small_batches(batches: Iterable[pa.RecordBatch], columns: Sequence[int]) -> Iterator[pa.RecordBatch]:
    """Yield some columns of batches in small ones. Arrow trusts a file's offsets until they are validated."""
    for batch in batches:
        arrays = [batch.column(column) for column in columns]
        for array in arrays:
            array.validate(full=True)
        for start in range(0, batch.num_rows, ROWS):
            parts = [array.slice(start, ROWS) for array in arrays]
            yield pa.RecordBatch.from_arrays(parts, [str(column) for column in columns])


def _column(path: AnyPath, schema: pa.Schema, known: Sequence[str]) -> str:
    """Return the first known column of a table; the case of its name does not matter."""
    lower = {name.lower(): name for name in schema.names}
    found = next((lower[name] for name in known if name in lower), None)
    if found is None:
        raise UserError(
            f"{path}: none of the columns {', '.join(known)}; rename one of its columns {', '.join(schema.names)}"
        )
    return found


def _check_types(path: AnyPath, schema: pa.Schema, image: str, identity: str) -> None:
    """Raise UserError if the columns cannot hold images and identities."""
    kind = schema.field(schema.names.index(image)).type
    parts = {child.name: child.type for child in kind} if pa.types.is_struct(kind) else {"bytes": kind}
    if not any(_is_text_or_bytes(parts[name]) for name in ("bytes", "path") if name in parts):
        raise UserError(f"{path}: column {image} holds {kind}, not encoded images or paths; write JPEG or PNG files")
    kind = schema.field(schema.names.index(identity)).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or _is_text_or_bytes(kind)):
        raise UserError(f"{path}: column {identity} holds {kind}, not numbers or names; convert it")


def _is_text_or_bytes(kind: pa.DataType) -> bool:
    """Return whether a type holds texts or bytes of any length."""
    checks = ("binary", "large_binary", "binary_view", "string", "large_string", "string_view")
    return any(getattr(pa.types, f"is_{check}")(kind) for check in checks)


def _class_names(schema: pa.Schema, identity: str, folders: Iterable[AnyPath]) -> list[str] | None:
    """Return the names of numbered classes from the metadata of Hugging Face's library, if there are any.

    They are in the table, or in a file beside it or in the source.
    """
    texts: list[Callable[[], bytes | str]] = [lambda: (schema.metadata or {})[b"huggingface"]]
    texts += [(folder / "dataset_info.json").read_bytes for folder in folders]
    for text in texts:
        try:
            told = json.loads(text())
            names = told.get("info", told)["features"][identity]["names"]
            if isinstance(names, list):
                return [str(name) for name in names]
        except (KeyError, TypeError, ValueError, AttributeError, OSError, RecursionError):
            continue
    return None


def _name(value: object, names: list[str] | None) -> str | None:
    """Return the name of an identity, or None if it is a number that stands for no class."""
    if names and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _parts(cell: object) -> tuple[str | None, bytes | None]:
    """Return the name and the bytes of an image cell, each None if it is not given."""
    parts = cell if isinstance(cell, dict) else {"path" if isinstance(cell, str) else "bytes": cell}
    called, data = parts.get("path"), parts.get("bytes")
    return (called if isinstance(called, str) else None), (data if isinstance(data, bytes) else None)


def _find_image(called: str, beside: AnyPath, root: AnyPath) -> tuple[str | None, int, str | None]:
    """Find an image that a table names: beside the table or below the source, and never outside the source.

    Returns:
        The file and its length in bytes, or None and the reason.
    """
    try:
        for folder in (beside, root):
            found = (folder / called).resolve()
            above = ".." in found.parts if isinstance(found, RemotePath) else root.resolve() not in found.parents
            if above:
                return None, 0, "its path leads out of the source"
            if found.is_file():
                return str(found), found.stat().st_size, None
    except (OSError, ValueError):
        return None, 0, "no path"
    return None, 0, "No such file or directory"

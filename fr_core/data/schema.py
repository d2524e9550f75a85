"""A dataset on disk: Parquet shards of JPEG bytes, ``manifest.json``, ``identities.parquet``, ``rejects.csv``.

There are two layouts of the same content. *flat*: a row is an image, and the rows were shuffled once at ingest.
*grouped*: a row is a chunk of images of one identity, for methods that need class images. Every page carries a CRC,
every shard a SHA-256.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from fr_core.data.store import AnyPath, RemotePath, atomic_file, local_copy, to_path, write_text_atomically
from fr_core.errors import StorageError, UserError

SCHEMA_VERSION = 2
# Ten numbers or null: x, y of left eye, right eye, nose, left and right mouth corner; pixels of the crop.
LANDMARKS = pa.list_(pa.float32())

Layout = Literal["flat", "grouped"]
FlatRow = tuple[int, int, bytes, np.ndarray | None]  # sample id, label, JPEG, landmarks float32 [5, 2]
SCHEMAS: dict[str, pa.Schema] = {
    "flat": pa.schema(
        [("sample_id", pa.int64()), ("label", pa.int32()), ("image", pa.binary()), ("landmarks", LANDMARKS)]
    ),
    "grouped": pa.schema(
        [
            ("label", pa.int32()),
            ("sample_ids", pa.list_(pa.int64())),
            ("images", pa.list_(pa.binary())),
            ("landmarks", pa.list_(LANDMARKS)),
        ]
    ),
}
CHUNK_IMAGES = 6  # images of a row of the grouped layout, unless ingest is told another number
GROUP_IMAGES = 128  # images of a row group, up to a chunk more; half a megabyte of faces is the unit of reading


class Shard(BaseModel):
    """A shard in the manifest: its file, sizes and checksum."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    row_groups: tuple[int, ...]  # images of each row group
    images: int
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """The content of ``manifest.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    layout: Layout
    image_size: int  # pixels, square
    identities: int  # labels run from 0; an identity without readable images keeps its label
    images: int
    shards: tuple[Shard, ...]
    source: str
    rejects: dict[str, int]  # reason → images left out; rejects.csv lists each image
    warnings: dict[str, int]
    passed: dict[str, int] = {}  # reason → files of the source that are no images of people
    notes: tuple[str, ...] = ()  # how the source was read
    chunk_images: int = 32  # images of a row of the grouped layout, at most; older manifests do not say it


@dataclass(frozen=True, eq=False)
class Dataset:
    """An opened folder of shards. Opening it reads the manifest and the files' sizes, but no images."""

    root: AnyPath
    manifest: Manifest

    @cached_property
    def row_groups(self) -> np.ndarray:
        """Return int64 [groups, 3]: shard, row group within the shard, images."""
        images = [np.array(shard.row_groups, np.int64) for shard in self.manifest.shards]
        by_shard = [np.column_stack([np.full(len(n), s), np.arange(len(n)), n]) for s, n in enumerate(images)]
        return np.concatenate([np.zeros((0, 3), np.int64), *by_shard])

    @cached_property
    def stamp(self) -> str:
        """Return the checksum of all shards' checksums, which identifies this dataset."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.manifest.shards).encode()).hexdigest()

    def read_row_group(self, shard: int, group: int, columns: list[str] | None = None) -> pa.Table:
        """Read one row group.

        Raises:
            UserError: the shard is damaged (a page's CRC, a truncated file), or was replaced after the dataset was
                opened. Names the shard.
            StorageError: the connection to a remote shard failed.
        """
        known = self.manifest.shards[shard]
        path = self.root / known.file
        try:
            return _reader(path, known).read_row_group(group, columns=columns)
        except (OSError, pa.ArrowException) as error:
            remote = isinstance(path, RemotePath) and not isinstance(error, FileNotFoundError)
            if remote and sha256(path) == known.sha256:  # the connection failed, not the shard
                raise StorageError(f"shard {path}: {_first_line(error)}; try again") from None
            raise UserError(f"shard {path} is damaged: {_first_line(error)}; ingest the photos again") from None

    def read_images(self, shard: int, group: int) -> list[FlatRow]:
        """Read the images of one row group of either layout, one after the other."""
        chunks = chunks_of(self.read_row_group(shard, group), self.manifest.layout)
        return list(itertools.chain.from_iterable(chunks))

    def check_sha256(self) -> None:
        """Compare every shard with its checksum.

        Raises:
            UserError: names the first shard that differs.
        """
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            files = [self.root / shard.file for shard in self.manifest.shards]
            for shard, digest in zip(self.manifest.shards, pool.map(sha256, files), strict=True):
                if digest != shard.sha256:
                    raise UserError(f"shard {self.root / shard.file}: wrong checksum; ingest the photos again")

    def identity_names(self) -> list[str]:
        """Return the names of the identities, by label."""
        return self._identities("name", "images")["name"].to_pylist()

    def identity_counts(self) -> np.ndarray:
        """Return the number of images of each identity, by label: int64 [identities]."""
        return self._identities("images")["images"].to_numpy()

    def _identities(self, *columns: str) -> pa.Table:
        """Read columns of the table of identities, the number of images among them.

        Raises:
            UserError: the table is damaged, or belongs to another dataset.
        """
        path = self.root / "identities.parquet"
        try:
            with local_copy(path) as file:
                table = pq.ParquetFile(file).read(columns=list(columns))
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} is damaged: {_first_line(error)}; ingest the photos again") from None
        known = (self.manifest.identities, self.manifest.images)
        found = (table.num_rows, pc.sum(table["images"]).as_py())
        if found != known:
            raise UserError(
                f"{path} lists {found[1]} images of {found[0]} identities, the manifest {known[1]} of {known[0]}; "
                "ingest the photos again"
            )
        return table


def open_dataset(root: str | AnyPath) -> Dataset:
    """Open a folder of shards, local or at a URL, and check the manifest and the presence and size of every shard.

    Raises:
        UserError: the folder is no dataset (says what it is and what to do), or has another schema version. Also if a
            shard is missing or truncated (names it).
    """
    root = to_path(root)
    path = root / "manifest.json"
    if not path.is_file():
        from fr_core.data.not_shards import explain  # imports OpenCV, which read tasks do without

        raise UserError(explain(root))
    try:
        text = path.read_text()
        version = json.loads(text).get("schema_version")
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path}: schema version {version}, but this program reads {SCHEMA_VERSION}; ingest the photos again"
            )
        manifest = Manifest.model_validate_json(text)
    except (ValidationError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a manifest: {_first_line(error)}; ingest the photos again") from None
    found = {file.name: file for file in root.iterdir()}
    for shard in manifest.shards:
        file = found.get(shard.file)
        if file is None or not file.is_file():
            raise UserError(f"shard {root / shard.file} is missing; copy the shards again, or ingest the photos again")
        if file.stat().st_size != shard.bytes:
            sizes = f"{file.stat().st_size} bytes, but {shard.bytes} in the manifest"
            raise UserError(f"shard {file}: {sizes}; truncated? Copy it again, or ingest the photos again")
    return Dataset(root, manifest)


def write_shard(path: AnyPath, table: pa.Table, layout: Layout) -> Shard:
    """Write one shard; the file is complete or absent."""
    images = np.ones(table.num_rows, np.int64)
    if layout == "grouped":
        images = pc.list_value_length(table["sample_ids"]).to_numpy().astype(np.int64)
    starts = group_starts(images)
    with atomic_file(path) as part:
        with pq.ParquetWriter(
            part,
            table.schema,
            write_page_checksum=True,
            compression="none",  # JPEG images do not compress further
            use_dictionary=False,
            write_statistics=False,
        ) as writer:
            for start, stop in itertools.pairwise([*starts, table.num_rows]):
                writer.write_table(table.slice(start, stop - start))
        return Shard(
            file=path.name,
            row_groups=tuple(np.add.reduceat(images, starts).tolist()),
            images=int(images.sum()),
            bytes=part.stat().st_size,
            sha256=sha256(part),
        )


def group_starts(images: np.ndarray) -> list[int]:
    """Return the first row of each row group of a shard, from the number of images in each row: int64 [rows]."""
    begun = np.cumsum(images) - images
    starts = [0]
    while (later := np.searchsorted(begun, begun[starts[-1]] + GROUP_IMAGES)) < len(images):
        starts.append(int(later))
    return starts


def write_manifest(root: AnyPath, manifest: Manifest, names: list[str], counts: np.ndarray) -> None:
    """Write ``identities.parquet``, then ``manifest.json``: a dataset exists once its manifest does."""
    labels = pa.array(np.arange(len(names)), pa.int32())
    table = pa.table({"label": labels, "name": pa.array(names, pa.string()), "images": pa.array(counts, pa.int64())})
    with atomic_file(root / "identities.parquet") as part:
        pq.write_table(table, part)
    write_text_atomically(root / "manifest.json", manifest.model_dump_json(indent=1) + "\n")


def flat_table(rows: Iterable[FlatRow]) -> pa.Table:
    """Make a table of the flat layout from rows."""
    ids, labels, images, points = zip(*rows, strict=True)
    columns = [ids, labels, images, [None if p is None else p.ravel() for p in points]]
    fields = SCHEMAS["flat"]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, fields, strict=True)], schema=fields)


def grouped_table(chunks: Iterable[list[FlatRow]]) -> pa.Table:
    """Make a table of the grouped layout from chunks of flat rows, each chunk of one identity."""
    columns: list[list] = [[], [], [], []]
    for chunk in chunks:
        ids, labels, images, points = zip(*chunk, strict=True)
        columns[0].append(labels[0])
        columns[1].append(ids)
        columns[2].append(images)
        columns[3].append([None if p is None else p.ravel() for p in points])
    fields = SCHEMAS["grouped"]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, fields, strict=True)], schema=fields)


def chunks_of(table: pa.Table, layout: Layout) -> list[list[FlatRow]]:
    """Split a table of either layout into chunks of rows: the inverse of :func:`flat_table` and :func:`grouped_table`.

    The chunks of a flat table hold one image each.
    """
    if layout == "flat":
        ids, labels, images, points = (table[name].to_pylist() for name in SCHEMAS["flat"].names)
        return [[(i, label, jpeg, _points(p))] for i, label, jpeg, p in zip(ids, labels, images, points, strict=True)]
    labels, ids, images, points = (table[name].to_pylist() for name in SCHEMAS["grouped"].names)
    return [
        [(i, label, jpeg, _points(p)) for i, jpeg, p in zip(*chunk, strict=True)]
        for label, *chunk in zip(labels, ids, images, points, strict=True)
    ]


def points_of(landmarks: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Convert a column of landmarks to float32 [images, 5, 2], NaN where they are unknown."""
    points = np.full((len(landmarks), 10), np.nan, np.float32)
    points[np.asarray(pc.is_valid(landmarks))] = np.asarray(pc.list_flatten(landmarks)).reshape(-1, 10)
    return points.reshape(-1, 5, 2)


def _points(numbers: list[float] | None) -> np.ndarray | None:
    """Convert ten numbers to five points."""
    return None if numbers is None else np.array(numbers, np.float32).reshape(5, 2)


def sha256(path: AnyPath) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with local_copy(path) as copy, copy.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reader(path: AnyPath, known: Shard) -> pq.ParquetFile:
    """Open a reader of a shard that verifies every page's checksum."""
    if isinstance(path, Path):
        return _open_parquet(path, known)
    file, footer = _open_remote(path, known)  # one reader per call, because many threads read
    return pq.ParquetFile(file, metadata=footer, pre_buffer=True, page_checksum_verification=True)


@lru_cache(maxsize=64)
def _open_parquet(path: Path, known: Shard) -> pq.ParquetFile:
    """Open a local shard.

    A new ingest may put another dataset under the same name. So ``known`` is part of the cache's key, and a file of
    another size is refused.
    """
    if path.stat().st_size != known.bytes:
        raise OSError(f"{path.stat().st_size} bytes, {known.bytes} when the dataset was opened")
    return pq.ParquetFile(path, page_checksum_verification=True)


@lru_cache(maxsize=512)
def _open_remote(path: RemotePath, known: Shard) -> tuple[pa.NativeFile, pq.FileMetaData]:
    """Open a remote shard and read its footer."""
    file = path.open_random()
    return file, pq.read_metadata(file)


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the error's type if the message is empty."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

"""Small datasets, and what is done to their files."""

from pathlib import Path

import numpy as np

from fr_core.data.crops import encode
from fr_core.data.schema import (
    SCHEMA_VERSION,
    Layout,
    Manifest,
    flat_table,
    grouped_table,
    write_manifest,
    write_shard,
)
from fr_core.data.store import AnyPath, atomic_file


def write_dataset(
    root: Path,
    images: int,
    identities: int,
    size: int = 32,
    per_shard: int = 500,
    seed: int = 0,
    layout: Layout = "flat",
    chunk: int = 32,
    points: bool = False,
    labels: np.ndarray | None = None,
) -> Path:
    """Shards of noisy images whose colours tell the identity; grouped ones in chunks of at most ``chunk``.

    Two of three have landmarks where ``points`` asks for them. Without ``labels``, they are drawn.
    """
    random = np.random.default_rng(seed)
    colours = random.integers(40, 215, (identities, 2, 2, 3))
    if labels is None:
        labels = np.concatenate([np.arange(identities), random.integers(0, identities, images - identities)])
    rows = []
    for i, label in enumerate(labels):
        image = np.kron(colours[label], np.ones((size // 2, size // 2, 1))) + random.normal(0, 25, (size, size, 3))
        rows.append((i, int(label), encode(np.clip(image, 0, 255).astype(np.uint8)), None))
    if points:
        own = random.normal(size / 2, size / 8, (images, 5, 2)).astype(np.float32)
        rows = [(*row[:3], own[i] if i % 3 else None) for i, row in enumerate(rows)]
    parts = [rows[start : start + per_shard] for start in range(0, images, per_shard)]
    tables = [flat_table(part) for part in parts]
    if layout == "grouped":
        own = [[row for row in rows if row[1] == label] for label in range(identities)]
        chunks = [group[start : start + chunk] for group in own for start in range(0, len(group), chunk)]
        each = -(-len(chunks) // len(parts))
        tables = [grouped_table(chunks[start : start + each]) for start in range(0, len(chunks), each)]
    root.mkdir(parents=True)
    shards = tuple(write_shard(root / f"shard-{s:05d}.parquet", table, layout) for s, table in enumerate(tables))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        layout=layout,
        image_size=size,
        identities=identities,
        images=images,
        shards=shards,
        source="test",
        rejects={},
        warnings={},
        chunk_images=chunk,
    )
    write_manifest(root, manifest, [f"id{i}" for i in range(identities)], np.bincount(labels, minlength=identities))
    return root


def flip_a_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def put(source: Path, target: AnyPath) -> AnyPath:
    """Copies a file or a folder to where ``target`` says."""
    for file in [source] if source.is_file() else [file for file in source.rglob("*") if file.is_file()]:
        place = target / file.relative_to(source).as_posix()
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(place) as part:
            part.write_bytes(file.read_bytes())
    return target

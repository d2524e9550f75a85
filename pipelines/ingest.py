"""Photos in, Parquet shards out: one task a shard, so that memory stays flat however many images there are."""

import csv
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fr_core import rng
from fr_core.data.crops import RejectedImage, make_crop
from fr_core.data.schema import (
    GROUP_IMAGES,
    SCHEMA_VERSION,
    FlatRow,
    Layout,
    Manifest,
    Shard,
    flat_table,
    grouped_table,
    write_manifest,
    write_shard,
)
from fr_core.data.sources import Listing, list_folder, match_landmarks, read_landmarks
from fr_core.errors import UserError

IMAGES_PER_SHARD = 8192
FEWEST_SHARDS = 8  # small sets are cut finer, so that all cores have work
CHUNK = 32  # images of one identity in a row of the grouped layout
MOST_REJECTS = 0.5
OWN_FILES = ("shard-*.parquet", "shard-*.part", "manifest.json*", "identities.parquet", "rejects.csv*")


@dataclass(frozen=True)
class ShardTask:
    """The images of one shard, in the order of its rows."""

    number: int
    root: str
    out: str
    layout: Layout
    image_size: int
    sample_ids: list[int]
    chunks: list[int]  # which images share a row of the grouped layout
    labels: list[int]
    paths: list[str]
    landmarks: list[Any]  # float32 [5, 2] or None


def ingest(
    source: Path,
    out: Path,
    layout: Layout = "flat",
    image_size: int = 112,
    landmarks: Path | None = None,
    overwrite: bool = False,
    on_ray: bool = True,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Makes a dataset of an identity folder.

    Args:
        layout: ``flat`` for training on single images, ``grouped`` for methods that need class images.
        landmarks: CSV of five points per image; images are aligned by it, and those without points are left out.
        on_ray: work in Ray tasks; otherwise in this process.
        progress: called with images done and in all.

    Raises:
        UserError: no images, an unwritable or used ``out``, or more than half of the images rejected.
    """
    listing = list_folder(source)
    points = match_landmarks(listing, read_landmarks(landmarks)) if landmarks else None
    prepare(source, out, overwrite)
    tasks = list(shard_tasks(listing, points, out, layout, image_size, seed))
    shards: list[Shard] = []
    rejects: list[tuple[str, str]] = []
    counts = np.zeros(len(listing.names), np.int64)
    not_square = done = 0
    for result in _by_ray(tasks) if on_ray else map(write_one, tasks):
        if result["shard"]:
            shards.append(Shard.model_validate(result["shard"]))
        rejects += [tuple(row) for row in result["rejects"]]
        labels, images = np.array(result["labels"], np.int64).reshape(2, -1)
        counts[labels] += images
        not_square += result["not_square"]
        done += result["images"]
        progress(done, len(listing.paths))
    _write_rejects(out, sorted(rejects))
    if len(rejects) > MOST_REJECTS * len(listing.paths):
        raise UserError(
            f"{source}: {len(rejects)} of {len(listing.paths)} images rejected, first {min(rejects)[0]} "
            f"({min(rejects)[1]}); see {out / 'rejects.csv'}"
        )
    empty = int((counts == 0).sum())
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        layout=layout,
        image_size=image_size,
        identities=len(listing.names),
        images=int(counts.sum()),
        shards=tuple(sorted(shards, key=lambda shard: shard.file)),
        source=str(source.resolve()),
        rejects={reason: sum(r == reason for _, r in rejects) for reason in sorted({r for _, r in rejects})},
        warnings={k: n for k, n in {"not_square": not_square, "identities_without_images": empty}.items() if n},
    )
    write_manifest(out, manifest, listing.names, counts)
    return manifest


def prepare(source: Path, out: Path, overwrite: bool) -> None:
    """Makes the output folder, or clears it of an earlier dataset's files and nothing else.

    Raises:
        UserError: it is not empty, lies in the source or around it, or cannot be written.
    """
    if source.resolve().is_relative_to(out.resolve()) or out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{out} and {source} lie in each other; write the shards somewhere else")
    try:
        if out.exists() and any(out.iterdir()) and not overwrite:
            raise UserError(f"{out} is not empty; --overwrite replaces the shards in it")
        out.mkdir(parents=True, exist_ok=True)
        for old in (file for pattern in OWN_FILES for file in out.glob(pattern)):
            old.unlink()
        probe = out / "rejects.csv.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None


def shard_tasks(
    listing: Listing, points: list[np.ndarray | None] | None, out: Path, layout: Layout, image_size: int, seed: int
) -> Iterator[ShardTask]:
    """Cuts a listing into shards: single images (flat) or identity chunks (grouped), shuffled once.

    Which of an identity's images share a chunk is drawn too: neighbours in a folder are often frames of one film.
    """
    total = len(listing.paths)
    images = np.arange(total)
    if layout == "grouped":
        images = np.lexsort((rng.generator(seed, "chunks").random(total), listing.labels))
    identity_starts = np.flatnonzero(np.diff(listing.labels, prepend=-1))
    starts = np.arange(total) if layout == "flat" else chunk_starts(identity_starts, total)
    order = rng.generator(seed, "ingest").permutation(len(starts))
    lengths = np.diff(starts, append=total)[order]
    per_shard = min(IMAGES_PER_SHARD, max(GROUP_IMAGES, -(-total // FEWEST_SHARDS)))
    shard_of = (np.cumsum(lengths) - 1) // per_shard
    for number, chunks in enumerate(np.split(np.arange(len(order)), np.flatnonzero(np.diff(shard_of)) + 1)):
        ids = np.concatenate([images[starts[order[c]] : starts[order[c]] + lengths[c]] for c in chunks])
        yield ShardTask(
            number,
            str(listing.root.resolve()),
            str(out.resolve()),
            layout,
            image_size,
            ids.tolist(),
            np.repeat(chunks, lengths[chunks]).tolist(),
            listing.labels[ids].tolist(),
            [listing.paths[i] for i in ids],
            [points[i] for i in ids] if points else [],
        )


def chunk_starts(identity_starts: np.ndarray, total: int) -> np.ndarray:
    """Cuts identities into nearly equal chunks of at most ``CHUNK`` images; the positions where they begin."""
    ends = np.append(identity_starts[1:], total)
    parts = [np.linspace(a, b, -(-(b - a) // CHUNK) + 1)[:-1] for a, b in zip(identity_starts, ends, strict=True)]
    return np.concatenate(parts).astype(np.int64)


def write_one(task: ShardTask) -> dict[str, Any]:
    """Reads, checks and crops the images of a shard and writes it.

    Returns:
        shard (None if nothing could be used), rejects [[path, reason]], labels [[label], [images]], not_square, images.
    """
    rows: list[FlatRow] = []
    chunks: list[int] = []
    rejects, not_square = [], 0
    for i, path in enumerate(task.paths):
        try:
            points = task.landmarks[i] if task.landmarks else None
            if task.landmarks and points is None:
                raise RejectedImage("no landmarks")
            jpeg, points, odd = make_crop((Path(task.root) / path).read_bytes(), task.image_size, points)
            not_square += odd
            rows.append((task.sample_ids[i], task.labels[i], jpeg, points))
            chunks.append(task.chunks[i])
        except RejectedImage as error:
            rejects.append([path, str(error)])
        except OSError as error:
            rejects.append([path, error.strerror or "unreadable"])
    shard = None
    if rows:
        whole = ([row for _, row in group] for _, group in itertools.groupby(zip(chunks, rows, strict=True), _first))
        table = flat_table(rows) if task.layout == "flat" else grouped_table(whole)
        shard = write_shard(Path(task.out) / f"shard-{task.number:05d}.parquet", table, task.layout).model_dump()
    labels, images = np.unique([label for _, label, _, _ in rows], return_counts=True)
    return {
        "shard": shard,
        "rejects": rejects,
        "labels": [labels.astype(int).tolist(), images.tolist()],
        "not_square": not_square,
        "images": len(task.paths),
    }


def _first(pair: tuple[int, FlatRow]) -> int:
    return pair[0]


def _by_ray(tasks: list[ShardTask]) -> Iterator[dict[str, Any]]:
    import ray

    from pipelines.on_ray import start_ray

    start_ray()
    ray.data.DataContext.get_current().enable_progress_bars = False
    stream = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks))
    results = stream.map(lambda row: {"result": json.dumps(write_one(row["task"]))}, num_cpus=1)
    for row in results.iter_rows():
        yield json.loads(row["result"])


def _write_rejects(out: Path, rejects: list[tuple[str, str]]) -> None:
    with (out / "rejects.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "reason"))
        writer.writerows(rejects)

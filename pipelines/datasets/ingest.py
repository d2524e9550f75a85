"""Faces in, Parquet shards out: one task a shard, so that no more than a shard's images are in memory at once.

A finished shard leaves its result beside it; an ingest that was stopped goes on with the shards that are missing.
"""

import csv
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fr_core import rng
from fr_core.data.crops import RejectedImage, make_crop
from fr_core.data.detect import detector, find_face
from fr_core.data.landmarks import match_landmarks, read_landmarks
from fr_core.data.listing import Listing, read_image
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
from fr_core.data.sources import list_source, list_unlabelled
from fr_core.data.store import (
    AnyPath,
    RemotePath,
    atomic_file,
    begin_job,
    explain_disk_errors,
    prefetch,
    to_path,
    write_text_atomically,
)
from fr_core.errors import UserError
from pipelines.on_ray import mapped, start_ray

IMAGES_PER_SHARD = 8192
FEWEST_SHARDS = 8  # small sets are cut finer, so that all cores have work
CHUNK = 32  # images of one identity in a row of the grouped layout
MOST_REJECTS = 0.5
STARTED = "ingest.json"  # says what an unfinished folder is to become
OWN_FILES = (STARTED, "shard-*.parquet", "shard-*.part", "shard-*.json*", "manifest.json*", "identities.parquet")


@dataclass(frozen=True)
class Job:
    """What every task of an ingest knows. Legend: I images in the order of the shards' rows."""

    listing: Listing
    points: np.ndarray | None  # float32 [images, 5, 2] in the listing's order, NaN where unknown
    align: bool  # find them
    out: AnyPath
    layout: Layout
    image_size: int
    sample_ids_I: np.ndarray  # int64, positions in the listing
    chunks_I: np.ndarray  # int64, which images share a row of the grouped layout
    starts: np.ndarray  # int64 [shards + 1], where each shard begins

    @property
    def shards(self) -> int:
        return len(self.starts) - 1

    @property
    def stamp(self) -> str:
        """Tells this job from any other; single photos that were changed since are not noticed."""
        listing = self.listing
        changed = [to_path(file).stat().st_mtime_ns for file in listing.files if listing.kind != "files"]
        made = (SCHEMA_VERSION, self.layout, self.image_size, self.align)
        facts = (*made, listing.kind, listing.files, changed, listing.names)
        digest = hashlib.sha256(repr(facts).encode())
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.listing.images.schema) as stream:
            stream.write_table(self.listing.images)
        digest.update(sink.getvalue())
        for array in (self.points, self.sample_ids_I, self.starts):
            digest.update(b"" if array is None else array.tobytes())
        return digest.hexdigest()


def ingest(
    source: str | AnyPath,
    out: str | AnyPath,
    layout: Layout = "flat",
    image_size: int = 112,
    landmarks: str | AnyPath | None = None,
    labels: str | AnyPath | None = None,
    overwrite: bool = False,
    on_ray: bool = True,
    seed: int = 0,
    align: bool = False,
    unlabelled: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Makes a dataset of a source, or goes on with one that was begun.

    Args:
        source: what :func:`fr_core.data.sources.list_source` reads.
        out: folder for the shards; like the source local, or at a URL that all nodes see.
        layout: ``flat`` for training on single images, ``grouped`` for methods that need class images.
        landmarks: CSV of 5 or 68 points per image; images are aligned by it, and those without points are left out.
        labels: list of the images and their identities, for a folder without identity folders.
        on_ray: work in Ray tasks; otherwise in this process.
        unlabelled: all images below the folder ``source`` are one identity.
        align: find the points of the face in each image, align by these, and leave out images without a face.
        progress: called with images done and in all.

    Raises:
        UserError: no images, an unwritable or used ``out``, more than half of the images rejected, or ``align`` with
            ``landmarks`` or without its detector.
    """
    if align and landmarks:
        raise UserError(f"--align finds the points that {landmarks} holds; give one of them")
    if unlabelled and labels:
        raise UserError(f"--unlabelled has no use for {labels}; give one of them")
    if align:
        detector()  # not installed? say so now
    source, out = to_path(source), to_path(out).resolve()
    refuse_nested(source, out)
    scratch = out.with_name(f"{out.name}.scratch") if isinstance(out, Path) else None  # of Parquet alone
    listing = list_unlabelled(source) if unlabelled else list_source(source, labels, scratch)
    points = match_landmarks(listing, read_landmarks(landmarks)) if landmarks else None
    job = plan_job(listing, points, align, out, layout, image_size, seed)
    begin_job(out, STARTED, job.stamp, (*OWN_FILES, "rejects.csv*"), overwrite)
    there = {file.name for file in out.iterdir()}
    finished = [number for number in range(job.shards) if _result_file(out, number).name in there]
    rest = [number for number in range(job.shards) if number not in set(finished)]
    run = _by_ray(job, rest) if on_ray else (write_one(job, number) for number in rest)
    shards: list[Shard] = []
    rejects: list[tuple[str, str]] = []
    counts = np.zeros(len(listing.names), np.int64)
    not_square = done = 0
    for result in itertools.chain((json.loads(_result_file(out, n).read_text()) for n in finished), run):
        if result["shard"]:
            shards.append(Shard.model_validate(result["shard"]))
        rejects += [tuple(row) for row in result["rejects"]]
        numbers, images = np.array(result["labels"], np.int64).reshape(2, -1)
        counts[numbers] += images
        not_square += result["not_square"]
        done += result["images"]
        progress(done, listing.images.num_rows)
    _write_rejects(out, sorted(rejects))
    for number in range(job.shards):
        _result_file(out, number).unlink()
    if len(rejects) > MOST_REJECTS * listing.images.num_rows:
        raise UserError(
            f"{source}: {len(rejects)} of {listing.images.num_rows} images rejected, first {min(rejects)[0]} "
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
    (out / STARTED).unlink()
    if scratch:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


def refuse_nested(source: AnyPath, out: AnyPath) -> None:
    """Raises UserError where one lies in the other."""
    a, b = source.resolve(), out.resolve()
    if a in (b, *b.parents) or b in a.parents:
        raise UserError(f"{out} and {source} lie in each other; write the shards somewhere else")


def plan_job(
    listing: Listing,
    points: np.ndarray | None,
    align: bool,
    out: AnyPath,
    layout: Layout,
    image_size: int,
    seed: int,
) -> Job:
    """Cuts a listing into shards: single images (flat) or identity chunks (grouped), shuffled once.

    Which of an identity's images share a chunk is drawn too: neighbours in a folder are often frames of one film.
    """
    labels, total = listing.labels, listing.images.num_rows
    images = np.arange(total)
    if layout == "grouped":
        images = np.lexsort((rng.generator(seed, "chunks").random(total), labels))
    identity_starts = np.flatnonzero(np.diff(labels, prepend=-1))
    starts = np.arange(total) if layout == "flat" else chunk_starts(identity_starts, total)
    order = rng.generator(seed, "ingest").permutation(len(starts))
    lengths = np.diff(starts, append=total)[order]
    begun = np.cumsum(lengths) - lengths
    within = np.arange(total) - np.repeat(begun, lengths)
    per_shard = min(IMAGES_PER_SHARD, max(GROUP_IMAGES, -(-total // FEWEST_SHARDS)))
    first_chunks = np.flatnonzero(np.diff((begun + lengths - 1) // per_shard, prepend=-1))
    return Job(
        listing,
        points,
        align,
        out,
        layout,
        image_size,
        images[np.repeat(starts[order], lengths) + within],
        np.repeat(np.arange(len(order)), lengths),
        np.append(begun[first_chunks], total),
    )


def chunk_starts(identity_starts: np.ndarray, total: int) -> np.ndarray:
    """Cuts identities into nearly equal chunks of at most ``CHUNK`` images; the positions where they begin."""
    ends = np.append(identity_starts[1:], total)
    parts = [np.linspace(a, b, -(-(b - a) // CHUNK) + 1)[:-1] for a, b in zip(identity_starts, ends, strict=True)]
    return np.concatenate(parts).astype(np.int64)


def write_one(job: Job, number: int) -> dict[str, Any]:
    """Reads, checks and crops the images of a shard, writes it, and then its result beside it.

    Returns:
        shard (None if nothing could be used), rejects [[path, reason]], labels [[label], [images]], not_square, images.

    Raises:
        UserError: it cannot be written.
    """
    part = slice(job.starts[number], job.starts[number + 1])
    sample_ids, chunks = job.sample_ids_I[part], job.chunks_I[part]
    points = job.points[sample_ids] if job.points is not None else itertools.repeat(None)
    find = find_face if job.align else None
    places = job.listing.images.take(pa.array(sample_ids)).to_pylist()
    reads: Iterator[Callable[[], bytes]] = (partial(_read, job.listing, place) for place in places)
    if isinstance(to_path(job.listing.files[0]), RemotePath):
        reads = prefetch(reads)
    rows: list[FlatRow] = []
    kept: list[int] = []
    rejects, not_square = [], 0
    images = zip(sample_ids.tolist(), chunks.tolist(), places, reads, points, strict=False)
    for sample_id, chunk, place, read, own in images:
        try:
            if own is not None and np.isnan(own).any():
                raise RejectedImage("no landmarks")
            jpeg, moved, odd = make_crop(read(), job.image_size, own, find)
            not_square += odd
            rows.append((sample_id, place["label"], jpeg, moved))
            kept.append(chunk)
        except RejectedImage as error:
            rejects.append([place["path"], str(error)])
    shard = None
    if rows:
        whole = ([row for _, row in group] for _, group in itertools.groupby(zip(kept, rows, strict=True), _first))
        table = flat_table(rows) if job.layout == "flat" else grouped_table(whole)
        with explain_disk_errors(job.out):
            shard = write_shard(job.out / f"shard-{number:05d}.parquet", table, job.layout).model_dump()
    labels, counts = np.unique([label for _, label, _, _ in rows], return_counts=True)
    result = {
        "shard": shard,
        "rejects": rejects,
        "labels": [labels.astype(int).tolist(), counts.tolist()],
        "not_square": not_square,
        "images": len(sample_ids),
    }
    with explain_disk_errors(job.out):
        write_text_atomically(_result_file(job.out, number), json.dumps(result))
    return result


def _read(listing: Listing, place: dict[str, Any]) -> bytes:
    return read_image(listing.kind, listing.files[place["file"]], place["path"], place["start"], place["length"])


def _result_file(out: AnyPath, number: int) -> AnyPath:
    return out / f"shard-{number:05d}.json"


def _first(pair: tuple[int, FlatRow]) -> int:
    return pair[0]


def _by_ray(job: Job, numbers: list[int]) -> Iterator[dict[str, Any]]:
    import ray

    start_ray()
    shared = ray.put(job)  # read by every task where it lies
    rows = [{"number": number} for number in numbers]
    for row in mapped(rows, lambda row: {"result": json.dumps(write_one(ray.get(shared), row["number"]))}, num_cpus=1):
        yield json.loads(row["result"])


def _write_rejects(out: AnyPath, rejects: list[tuple[str, str]]) -> None:
    with atomic_file(out / "rejects.csv") as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "reason"))
        writer.writerows(rejects)

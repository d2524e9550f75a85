"""Turn faces into Parquet shards. Each task writes one shard, so it holds one shard's images in memory.

A finished shard leaves a result file beside it. A stopped ingest continues with the missing shards.
"""

import csv
import hashlib
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fr_core import rng
from fr_core.data.crops import make_crop
from fr_core.data.detect import detector, find_face
from fr_core.data.landmarks import match_landmarks, read_landmarks
from fr_core.data.listing import Listing, read_image
from fr_core.data.photos import RejectedImage
from fr_core.data.schema import (
    CHUNK_IMAGES,
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
from pipelines.on_ray import map_rows
from pipelines.ray_start import start_ray

IMAGES_PER_SHARD = 8192
MIN_SHARDS = 8  # small datasets are cut finer, so that all cores have work
MAX_REJECTED_SHARE = 0.5
STARTED = "ingest.json"  # identifies the job that an unfinished folder belongs to
OWN_FILES = (STARTED, "shard-*.parquet", "shard-*.part", "shard-*.json*", "manifest.json*", "identities.parquet")


@dataclass(frozen=True)
class Job:
    """Describe an ingest to its tasks. Legend: I images, in the order of the shards' rows."""

    listing: Listing
    points: np.ndarray | None  # float32 [images, 5, 2], pixels, in the listing's order; NaN where unknown
    align: bool  # a detector finds the points
    out: AnyPath
    layout: Layout
    image_size: int
    sample_ids_I: np.ndarray  # int64, position of each image in the listing
    chunks_I: np.ndarray  # int64, images of one chunk share a row of the grouped layout
    starts: np.ndarray  # int64 [shards + 1], first image of each shard, then the number of images

    @property
    def shard_count(self) -> int:
        """Return the number of shards."""
        return len(self.starts) - 1

    @property
    def stamp(self) -> str:
        """Return a checksum that differs for every job.

        The modification times of archives are part of the checksum; those of single photos are not.
        """
        listing = self.listing
        changed = [to_path(file).stat().st_mtime_ns for file in listing.files if listing.kind != "files"]
        made = (SCHEMA_VERSION, self.layout, self.image_size, self.align)
        facts = (*made, listing.kind, listing.files, changed, listing.names, listing.lost)
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
    chunk: int = CHUNK_IMAGES,
    level: int | None = None,
    names_in: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Make a dataset of a source, or continue a stopped ingest.

    Args:
        source: a path or URL that :func:`fr_core.data.sources.list_source` reads.
        out: folder for the shards: a local path, or a URL that all nodes see.
        layout: ``flat`` for training on single images, ``grouped`` for methods that need class images.
        landmarks: CSV of 5 or 68 points per image. Images are aligned by their points; images without are left out.
        labels: list of the images and their identities, for a folder without identity folders.
        on_ray: whether Ray tasks do the work; otherwise this process does.
        unlabelled: whether all images below the folder ``source`` become one identity.
        align: whether a detector finds the points of each face to align by. Images without a face are left out.
        chunk: images of one identity in a row of the grouped layout, at most.
        level: which folder below the source is the person, counted from 1; None finds it.
        names_in: encoding of the file names in zips that state none.
        progress: called with the images done and the total.

    Raises:
        UserError: no images, more than half of the images rejected, ``out`` in use or not writable, ``align`` with
            ``landmarks``, or no detector installed.
    """
    if align and landmarks:
        raise UserError(f"--align finds the points that {landmarks} holds: give one of the two")
    if unlabelled and labels:
        raise UserError(f"--unlabelled makes no use of {labels}: give one of the two")
    if align:
        detector()  # a missing detector is an error before any work
    source, out = to_path(source), to_path(out).resolve()
    refuse_nested(source, out)
    scratch = out.with_name(f"{out.name}.scratch") if isinstance(out, Path) else None  # used for tables only
    listing = list_unlabelled(source) if unlabelled else list_source(source, labels, scratch, level, names_in)
    points, notes = match_landmarks(listing.paths, read_landmarks(landmarks)) if landmarks else (None, [])
    job = plan_job(listing, points, align, out, layout, image_size, seed, chunk)
    begin_job(out, STARTED, job.stamp, (*OWN_FILES, "rejects.csv*"), overwrite)
    existing = {file.name for file in out.iterdir()}
    finished = [number for number in range(job.shard_count) if _result_file(out, number).name in existing]
    missing = [number for number in range(job.shard_count) if number not in set(finished)]
    earlier = (json.loads(_result_file(out, number).read_text()) for number in finished)
    new = _write_on_ray(job, missing) if on_ray else (write_one(job, number) for number in missing)
    shards: list[Shard] = []
    rejects = list(listing.lost)
    counts = np.zeros(len(listing.names), np.int64)
    not_square = repaired = done = 0
    for result in itertools.chain(earlier, new):
        if result["shard"]:
            shards.append(Shard.model_validate(result["shard"]))
        rejects += [tuple(row) for row in result["rejects"]]
        numbers, images = np.array(result["labels"], np.int64).reshape(2, -1)
        counts[numbers] += images
        not_square += result["not_square"]
        repaired += result["repaired"]
        done += result["images"]
        progress(done, listing.images.num_rows)
    _write_rejects(out, sorted(rejects))
    for number in range(job.shard_count):
        _result_file(out, number).unlink()
    total = listing.images.num_rows + len(listing.lost)
    if len(rejects) > MAX_REJECTED_SHARE * total:
        raise UserError(
            f"{source}: {len(rejects)} of {total} images rejected, first {min(rejects)[0]} "
            f"({min(rejects)[1]}); see {out / 'rejects.csv'}"
        )
    reasons = Counter(sorted(reason for _, reason in rejects))
    empty = int((counts == 0).sum())
    warnings = {"not_square": not_square, "identities_without_images": empty, "repaired": repaired}
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        layout=layout,
        image_size=image_size,
        identities=len(listing.names),
        images=int(counts.sum()),
        shards=tuple(sorted(shards, key=lambda shard: shard.file)),
        source=str(source.resolve()),
        rejects=dict(reasons),
        passed=listing.passed,
        notes=(*listing.notes, *notes),
        warnings={name: count for name, count in warnings.items() if count},
        chunk_images=chunk if layout == "grouped" else 1,
    )
    write_manifest(out, manifest, listing.names, counts)
    (out / STARTED).unlink()
    if scratch:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


def refuse_nested(source: AnyPath, out: AnyPath) -> None:
    """Raise UserError if the source and the output folder lie in each other."""
    a, b = source.resolve(), out.resolve()
    if a in (b, *b.parents) or b in a.parents:
        raise UserError(f"{out} and {source} lie in each other: name another folder for the shards")


def plan_job(
    listing: Listing,
    points: np.ndarray | None,
    align: bool,
    out: AnyPath,
    layout: Layout,
    image_size: int,
    seed: int,
    chunk: int,
) -> Job:
    """Cut a listing into shards: single images (flat) or identity chunks (grouped), shuffled once.

    The images of a chunk are drawn at random too, because neighbours in a folder are often frames of one film.
    """
    labels, total = listing.labels, listing.images.num_rows
    images = np.arange(total)
    if layout == "grouped":
        images = np.lexsort((rng.generator(seed, "chunks").random(total), labels))
    identity_starts = np.flatnonzero(np.diff(labels, prepend=-1))
    starts = np.arange(total) if layout == "flat" else chunk_starts(identity_starts, total, chunk)
    order = rng.generator(seed, "ingest").permutation(len(starts))
    lengths = np.diff(starts, append=total)[order]
    ends = np.cumsum(lengths)
    begins = ends - lengths
    within_chunk = np.arange(total) - np.repeat(begins, lengths)
    per_shard = min(IMAGES_PER_SHARD, max(GROUP_IMAGES, -(-total // MIN_SHARDS)))
    shard_of_chunk = (ends - 1) // per_shard
    first_chunks = np.flatnonzero(np.diff(shard_of_chunk, prepend=-1))
    return Job(
        listing,
        points,
        align,
        out,
        layout,
        image_size,
        images[np.repeat(starts[order], lengths) + within_chunk],
        np.repeat(np.arange(len(order)), lengths),
        np.append(begins[first_chunks], total),
    )


def chunk_starts(run_starts: np.ndarray, total: int, chunk: int) -> np.ndarray:
    """Cut runs of images of one identity into nearly equal chunks of at most ``chunk`` images.

    Returns:
        int64, the position where each chunk begins.
    """
    lengths = np.diff(run_starts, append=total)
    counts = -(-lengths // chunk)
    starts, lengths, cuts = (np.repeat(per_run, counts) for per_run in (run_starts, lengths, counts))
    number = np.arange(len(starts)) - np.repeat(np.cumsum(counts) - counts, counts)
    return starts + number * lengths // cuts


def write_one(job: Job, number: int) -> dict[str, Any]:
    """Read, check and crop the images of a shard, write the shard, then write its result file.

    Returns:
        shard (None without usable images), rejects [[path, reason]], labels [[label], [images]], not_square, repaired,
        images.

    Raises:
        UserError: the shard cannot be written.
    """
    part = slice(job.starts[number], job.starts[number + 1])
    sample_ids, chunks = job.sample_ids_I[part], job.chunks_I[part]
    points = job.points[sample_ids] if job.points is not None else itertools.repeat(None)
    find = find_face if job.align else None
    places = job.listing.images.take(pa.array(sample_ids)).to_pylist()
    reads: Iterator[Callable[[], bytes]] = (partial(_read_bytes, job.listing, place) for place in places)
    if isinstance(to_path(job.listing.files[0]), RemotePath):
        reads = prefetch(reads)
    rows: list[FlatRow] = []
    kept: list[int] = []
    rejects, not_square, repaired = [], 0, 0
    images = zip(sample_ids.tolist(), chunks.tolist(), places, reads, points, strict=False)
    for sample_id, chunk, place, read, image_points in images:
        try:
            if image_points is not None and np.isnan(image_points).any():
                raise RejectedImage("no landmarks")
            crop = make_crop(read(), job.image_size, image_points, find)
            not_square += crop.not_square
            repaired += crop.repaired
            rows.append((sample_id, place["label"], crop.jpeg, crop.landmarks))
            kept.append(chunk)
        except RejectedImage as error:
            rejects.append([place["path"], str(error)])
    shard = None
    if rows:
        by_chunk = itertools.groupby(zip(kept, rows, strict=True), lambda pair: pair[0])
        grouped = ([row for _, row in group] for _, group in by_chunk)
        table = flat_table(rows) if job.layout == "flat" else grouped_table(grouped)
        with explain_disk_errors(job.out):
            shard = write_shard(job.out / f"shard-{number:05d}.parquet", table, job.layout).model_dump()
    labels, counts = np.unique([label for _, label, _, _ in rows], return_counts=True)
    result = {
        "shard": shard,
        "rejects": rejects,
        "labels": [labels.astype(int).tolist(), counts.tolist()],
        "not_square": not_square,
        "repaired": repaired,
        "images": len(sample_ids),
    }
    with explain_disk_errors(job.out):
        write_text_atomically(_result_file(job.out, number), json.dumps(result))
    return result


def _read_bytes(listing: Listing, place: dict[str, Any]) -> bytes:
    return read_image(listing.kind, listing.files[place["file"]], place["path"], place["start"], place["length"])


def _result_file(out: AnyPath, number: int) -> AnyPath:
    return out / f"shard-{number:05d}.json"


def _write_on_ray(job: Job, numbers: list[int]) -> Iterator[dict[str, Any]]:
    import ray

    start_ray()
    shared = ray.put(job)  # every task reads the one copy in the object store
    rows = [{"number": number} for number in numbers]

    def write(row: dict[str, int]) -> dict[str, str]:
        return {"result": json.dumps(write_one(ray.get(shared), row["number"]))}

    for row in map_rows(rows, write, num_cpus=1):
        yield json.loads(row["result"])


def _write_rejects(out: AnyPath, rejects: list[tuple[str, str]]) -> None:
    with atomic_file(out / "rejects.csv") as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "reason"))
        writer.writerows(rejects)

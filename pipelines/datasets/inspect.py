"""Describe a dataset: images per identity, a sheet of faces, damaged images and duplicates."""

import csv
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fr_core.data.crops import square
from fr_core.data.photos import RejectedImage, read_rgb
from fr_core.data.schema import Dataset, open_dataset
from fr_core.data.store import AnyPath
from fr_core.verify.report import contact_sheet

SHOWN = (8, 10)  # identities on the contact sheet, and images of each


def inspect(
    shards: str | AnyPath,
    out: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Read and decode every image of a dataset, with one row group in memory at a time.

    Args:
        out: folder for ``identities.png`` (histogram), ``faces.png`` (contact sheet) and ``findings.csv``. The CSV
            lists every damaged image and every duplicate.

    Returns:
        - images, identities.
        - fewest_images, median_images, most_images: images per identity, without identities that have none.
        - lonely: identities with one image. empty: identities without images.
        - damaged: images that cannot be decoded.
        - duplicates: images whose bytes equal those of an earlier image.
        - in_two_identities: duplicates whose earlier image belongs to another identity.

    Raises:
        UserError: no dataset, or a damaged shard.
    """
    dataset = open_dataset(shards)
    counts, names = dataset.identity_counts(), dataset.identity_names()
    total = dataset.manifest.images
    samples, labels, hashes = np.empty(total, np.int64), np.empty(total, np.int64), np.empty(total, np.uint64)
    damaged: list[tuple[int, int, str]] = []
    done = 0
    with ThreadPoolExecutor() as threads:
        for shard, number, _ in dataset.row_groups.tolist():
            group = dataset.read_images(shard, number)
            part = slice(done, done + len(group))
            jpegs = [jpeg for _, _, jpeg, _ in group]
            samples[part], labels[part] = [row[0] for row in group], [row[1] for row in group]
            hashes[part] = list(threads.map(_content_hash, jpegs))
            for row, reason in zip(group, threads.map(_damage, jpegs), strict=True):
                if reason:
                    damaged.append((row[0], row[1], reason))
            done += len(group)
            progress(done, total)
    order = np.lexsort((samples, hashes))
    duplicates = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
    originals = order[np.searchsorted(hashes[order], hashes[duplicates])]
    if out:
        out.mkdir(parents=True, exist_ok=True)
        _sizes_figure(counts).savefig(out / "identities.png")
        _faces_figure(dataset, names).savefig(out / "faces.png")
        with (out / "findings.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("sample_id", "identity", "finding"))
            writer.writerows((sample, names[label], reason) for sample, label, reason in damaged)
            for image, original in zip(duplicates.tolist(), originals.tolist(), strict=True):
                finding = f"same bytes as {samples[original]} of {names[labels[original]]}"
                writer.writerow((samples[image], names[labels[image]], finding))
    present = counts[counts > 0]
    return {
        "images": total,
        "identities": len(counts),
        "fewest_images": int(present.min()),
        "median_images": float(np.median(present)),
        "most_images": int(present.max()),
        "lonely": int((counts == 1).sum()),
        "empty": int((counts == 0).sum()),
        "damaged": len(damaged),
        "duplicates": len(duplicates),
        "in_two_identities": int((labels[duplicates] != labels[originals]).sum()),
    }


def _content_hash(jpeg: bytes) -> int:
    """Return a 64-bit hash of the bytes."""
    return int.from_bytes(hashlib.blake2b(jpeg, digest_size=8).digest(), "little")


def _damage(jpeg: bytes) -> str:
    """Return why an image cannot be decoded, or an empty string."""
    try:
        read_rgb(jpeg)
    except RejectedImage as error:
        return str(error)
    return ""


def _sizes_figure(counts: np.ndarray) -> Figure:
    """Draw a histogram of images per identity."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    edges = np.geomspace(1, max(2, counts.max()), 40)
    axes.hist(counts[counts > 0], bins=edges.tolist())
    axes.set(xscale="log", yscale="log", xlabel="images per identity", ylabel="identities")
    axes.set_title(f"{int(counts.sum()):,} images of {int((counts > 0).sum()):,} identities")
    return figure


def _faces_figure(dataset: Dataset, names: list[str]) -> Figure:
    """Draw faces, one identity a row: the identities with most images in the first row groups."""
    rows, columns = SHOWN
    faces: dict[int, list[np.ndarray]] = {}
    for shard, number, _ in dataset.row_groups[:rows].tolist():
        for _, label, jpeg, _ in dataset.read_images(shard, number):
            if not _damage(jpeg):
                faces.setdefault(label, []).append(square(read_rgb(jpeg), dataset.manifest.image_size))
    chosen = sorted(faces, key=lambda label: -len(faces[label]))[:rows]
    width = min(columns, max((len(faces[label]) for label in chosen), default=1))
    blank = np.full((dataset.manifest.image_size,) * 2 + (3,), 255, np.uint8)
    sheet = [face for label in chosen for face in (faces[label] + [blank] * width)[:width]] or [blank]
    return contact_sheet(np.stack(sheet), width, ", ".join(names[label] for label in chosen))

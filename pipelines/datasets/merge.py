"""Datasets into one, or into two: identities mapped, listed images left out, JPEG bytes untouched.

The rows of a shard come from all parts alike and are shuffled; parts are shuffled themselves, so no more is needed.
"""

import csv
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from fr_core import rng
from fr_core.data.schema import (
    GROUP_IMAGES,
    SCHEMA_VERSION,
    Dataset,
    FlatRow,
    Layout,
    Manifest,
    chunks_of,
    flat_table,
    grouped_table,
    open_dataset,
    write_manifest,
    write_shard,
)
from fr_core.data.store import AnyPath, atomic_file, begin_job
from fr_core.errors import UserError
from fr_core.verify.identities import nearest_centres
from fr_core.verify.pairs import write_pairs
from pipelines.datasets.clean import all_centres
from pipelines.datasets.embed import embed
from pipelines.datasets.ingest import FEWEST_SHARDS, IMAGES_PER_SHARD
from pipelines.datasets.unpack import folder_names

STARTED, EMBEDDINGS = "merge.json", "embeddings"
OWN_FILES = ("shard-*.parquet", "shard-*.part", "manifest.json*", "identities.parquet", "identity_map.csv*")
MAP_COLUMNS = ("dataset", "identity", "becomes", "cosine")
FEWEST_HELD_OUT = 20  # identities: ten folds of two


@dataclass(frozen=True)
class Part:
    """What becomes of a dataset."""

    dataset: Dataset
    labels_N: np.ndarray  # int64, the label of each identity in the result; −1: left out
    without: Mapping[int, str] = field(default_factory=dict)  # sample ids left out -> their identity, or ""
    first_id: int = 0  # added to the sample ids

    @cached_property
    def names(self) -> list[str]:
        return self.dataset.identity_names()


def merge(
    datasets: Sequence[AnyPath],
    out: Path,
    same_names: bool = False,
    model: str | None = None,
    net: str | None = None,
    overlap: float = 0.7,
    without: Path | None = None,
    on_ray: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Makes one dataset of several, or of one without the images of a list.

    Identities of two datasets are different people unless ``same_names`` or ``model`` says otherwise. What became of
    each is in ``identity_map.csv``.

    Args:
        same_names: those called alike are one person.
        model: a net (:func:`fr_core.nets.open.open_net`); an identity whose centre is as near as ``overlap`` to one of
            an earlier dataset is that person.
        overlap: cosine.
        without: of one dataset, a CSV with a column ``sample_id``, such as ``clean.csv`` of ``bigface clean``; where it
            has a column ``identity`` too, that must be the sample's.

    Returns:
        images, identities, joined (identities that were found in an earlier dataset), left_out (images).

    Raises:
        UserError: datasets that differ in layout or image size, a used ``out``, or an unreadable list.
    """
    if without and len(datasets) > 1:
        raise UserError("--without is for one dataset, since each has sample ids of its own; clean first, then merge")
    opened = [open_dataset(path) for path in datasets]
    form_of(opened)
    left_out = read_list(without) if without else {}
    stamp = "+".join(dataset.stamp for dataset in opened)
    begin_job(out, STARTED, stamp, OWN_FILES, overwrite, beside=[EMBEDDINGS])
    names = [dataset.identity_names() for dataset in opened]
    becomes, cosines = _new_identities(names), [np.full(len(own), np.nan) for own in names]
    if same_names:
        _join_by_name(names, becomes)
    if model:
        _join_by_centre(opened, becomes, cosines, model, net, overlap, out / EMBEDDINGS, on_ray, progress)
    used, flat = np.unique(np.concatenate(becomes), return_inverse=True)
    labels = np.split(flat, np.cumsum([len(own) for own in names])[:-1])
    titles = _titles([path.resolve().name for path in datasets], names, used)
    firsts = np.cumsum([0] + [_largest_id(dataset) + 1 for dataset in opened[:-1]])
    parts = [
        Part(dataset, own, left_out, first) for dataset, own, first in zip(opened, labels, firsts.tolist(), strict=True)
    ]
    with atomic_file(out / "identity_map.csv") as scratch, scratch.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(MAP_COLUMNS)
        for path, own, new, near in zip(datasets, names, labels, cosines, strict=True):
            for name, identity, cosine in zip(own, new.tolist(), near.tolist(), strict=True):
                writer.writerow((path, name, titles[identity], "" if np.isnan(cosine) else f"{cosine:.4f}"))
    manifest = write_parts(parts, titles, out, " + ".join(map(str, datasets)), progress=progress)
    (out / STARTED).unlink()
    before = sum(dataset.manifest.images for dataset in opened)
    return {
        "images": manifest.images,
        "identities": manifest.identities,
        "joined": sum(map(len, names)) - len(used),
        "left_out": before - manifest.images,
    }


def split(
    shards: AnyPath,
    out: Path,
    share: float = 0.1,
    pairs_per_fold: int = 300,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Holds identities out of a dataset: ``train/`` shards, and ``verify/images`` with ``verify/pairs.csv`` of others.

    Args:
        share: of the identities, drawn among those with two images or more.
        pairs_per_fold: of each kind; there are ten folds, and no identity is in two of them.

    Returns:
        images, identities, held_out_images, held_out_identities.

    Raises:
        UserError: too few identities, or a used ``out``.
    """
    dataset = open_dataset(shards)
    counts, names = dataset.identity_counts(), dataset.identity_names()
    able = np.flatnonzero(counts >= 2)
    wanted = max(FEWEST_HELD_OUT, int(share * len(able)))
    if wanted > len(able) // 2:
        raise UserError(f"{shards}: {wanted} of {len(able)} identities with two images or more cannot be held out")
    held_out = np.isin(np.arange(len(names)), rng.generator(seed, "split").choice(able, wanted, replace=False))
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty")
    (out / "train").mkdir(parents=True)
    kept = np.flatnonzero(~held_out)
    labels = np.full(len(names), -1)
    labels[kept] = np.arange(len(kept))
    train = write_parts([Part(dataset, labels)], [names[i] for i in kept], out / "train", str(shards), seed, progress)
    folders, images = folder_names(names), 0
    for shard, group, _ in dataset.row_groups.tolist():
        for sample_id, label, jpeg, _ in dataset.read_images(shard, group):
            if held_out[label]:
                path = out / "verify" / "images" / folders[label] / f"{sample_id:08d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(jpeg)
                images += 1
    write_pairs(out / "verify", pairs_per_fold, seed)
    return {
        "images": train.images,
        "identities": train.identities,
        "held_out_images": images,
        "held_out_identities": wanted,
    }


def write_parts(
    parts: list[Part],
    names: list[str],
    out: Path,
    source: str,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Writes the parts as one dataset, a shard in memory at a time.

    Args:
        names: of the identities of the result.

    Raises:
        UserError: parts of different layout or image size, or nothing left.
    """
    layout, image_size = form_of([part.dataset for part in parts])
    total = sum(part.dataset.manifest.images for part in parts)
    number = -(-total // min(IMAGES_PER_SHARD, max(GROUP_IMAGES, -(-total // FEWEST_SHARDS))))
    shares = [np.array_split(part.dataset.row_groups, number) for part in parts]
    counts, shards, done, left_out = np.zeros(len(names), np.int64), [], 0, 0
    for shard in range(number):
        chunks: list[list[FlatRow]] = []
        for part, groups in zip(parts, shares, strict=True):
            for where in groups[shard].tolist():
                kept, left = _selected(part, where[0], where[1], layout)
                chunks += kept
                left_out += left
                done += where[2]
            progress(done, total)
        for chunk in chunks:
            counts[chunk[0][1]] += len(chunk)
        shuffled = [chunks[i] for i in rng.generator(seed, "merge", shard).permutation(len(chunks))]
        if shuffled:
            table = flat_table(itertools.chain(*shuffled)) if layout == "flat" else grouped_table(shuffled)
            shards.append(write_shard(out / f"shard-{shard:05d}.parquet", table, layout))
    if not shards:
        raise UserError(f"{source}: no images are left")
    listed = sum(len(part.without) for part in parts)
    if left_out < listed:
        raise UserError(f"{listed - left_out} of the {listed} listed samples are not in {source}: a list of other data")
    empty = int((counts == 0).sum())
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        layout=layout,
        image_size=image_size,
        identities=len(names),
        images=int(counts.sum()),
        shards=tuple(shards),
        source=source,
        rejects={},
        warnings={"identities_without_images": empty} if empty else {},
    )
    write_manifest(out, manifest, names, counts)
    return manifest


def form_of(datasets: Sequence[Dataset]) -> tuple[Layout, int]:
    """The layout and image size that all have.

    Raises:
        UserError: they differ.
    """
    forms = {(dataset.manifest.layout, dataset.manifest.image_size) for dataset in datasets}
    if len(forms) > 1:
        found = ", ".join(f"{layout} {size} px" for layout, size in sorted(forms))
        raise UserError(f"datasets of different form cannot be one: {found}")
    return forms.pop()


def read_list(path: Path) -> dict[int, str]:
    """The columns ``sample_id`` and, if it is there, ``identity`` of a CSV.

    Raises:
        UserError: unreadable, no such column, or no numbers in it.
    """
    try:
        with path.open(newline="") as file:
            return {int(row["sample_id"]): row.get("identity") or "" for row in csv.DictReader(file)}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: expected a CSV with a column sample_id of whole numbers") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _selected(part: Part, shard: int, group: int, layout: Layout) -> tuple[list[list[FlatRow]], int]:
    """The chunks of a row group that stay, as they are called in the result, and how many listed images do not.

    Raises:
        UserError: a listed image is another identity's.
    """
    kept, left_out = [], 0
    for chunk in chunks_of(part.dataset.read_row_group(shard, group), layout):
        rows: list[FlatRow] = []
        for sample_id, label, jpeg, points in chunk:
            if sample_id in part.without:
                left_out += 1
                told, own = part.without[sample_id], part.names[label]
                if told not in ("", own):
                    raise UserError(f"sample {sample_id} is {told!r} in the list, {own!r} here: a list of other data")
            elif part.labels_N[label] >= 0:
                rows.append((part.first_id + sample_id, int(part.labels_N[label]), jpeg, points))
        if rows:
            kept.append(rows)
    return kept, left_out


def _new_identities(names: list[list[str]]) -> list[np.ndarray]:
    """Every identity of every dataset a number of its own."""
    ends = np.cumsum([len(own) for own in names])
    return [np.arange(end - len(own), end) for end, own in zip(ends, names, strict=True)]


def _titles(folders: list[str], names: list[list[str]], used: np.ndarray) -> list[str]:
    """What the identities that are left are called: their names; ``NAME@FOLDER`` where several are called alike."""
    owners = [(name, folder) for folder, own in zip(folders, names, strict=True) for name in own]
    left = [owners[number] for number in used.tolist()]
    alike = Counter(name for name, _ in left)
    titles = [f"{name}@{folder}" if alike[name] > 1 else name for name, folder in left]
    again = Counter(titles)  # folders are called alike too
    return [f"{title}-{number}" if again[title] > 1 else title for number, title in enumerate(titles)]


def _join_by_name(names: list[list[str]], becomes: list[np.ndarray]) -> None:
    first: dict[str, int] = {}
    for own, new in zip(names, becomes, strict=True):
        for label, name in enumerate(own):
            new[label] = first.setdefault(name, int(new[label]))


def _join_by_centre(
    opened: list[Dataset],
    becomes: list[np.ndarray],
    cosines: list[np.ndarray],
    model: str,
    net: str | None,
    overlap: float,
    out: Path,
    on_ray: bool,
    progress: Callable[[int, int], None],
) -> None:
    known_ND = np.zeros((0, 0), np.float32)  # centres of the identities of the datasets so far, in their order
    for number, dataset in enumerate(opened):
        embeddings = embed(model, dataset.root, out, net, on_ray=on_ray, own_folder=True, progress=progress)
        own_ND = all_centres(embeddings, dataset.manifest.identities)
        if number:
            nobody, before = np.full(len(own_ND), -1), np.concatenate(becomes[:number])
            nearest = nearest_centres(own_ND, known_ND, nobody)
            row_N, cosines[number] = (np.concatenate(parts) for parts in zip(*nearest, strict=True))
            joins = (cosines[number] >= overlap) & (row_N >= 0) & ~np.isin(becomes[number], before)
            moved = np.arange(sum(map(len, becomes)))
            moved[becomes[number][joins]] = before[row_N[joins]]
            for own in becomes:
                own[:] = moved[own]
        known_ND = np.concatenate([known_ND, own_ND]) if number else own_ND


def _largest_id(dataset: Dataset) -> int:
    column = "sample_id" if dataset.manifest.layout == "flat" else "sample_ids"
    tables = (dataset.read_row_group(shard, group, [column]) for shard, group, _ in dataset.row_groups.tolist())
    flat = (np.concatenate(t[column].to_numpy()) if column == "sample_ids" else t[column].to_numpy() for t in tables)
    return max(int(ids.max()) for ids in flat)

"""Datasets into one, or into two: identities mapped, listed images left out, JPEG bytes untouched.

The rows of a shard come from all parts alike and are shuffled; parts are shuffled themselves, so no more is needed.
"""

import csv
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from fr_core.data.store import AnyPath
from fr_core.errors import UserError
from fr_core.verify.identities import nearest_centres
from fr_core.verify.pairs import make_pairs
from pipelines.clean import all_centres
from pipelines.embed import embed
from pipelines.ingest import FEWEST_SHARDS, IMAGES_PER_SHARD
from pipelines.unpack import folder_names

MAP_COLUMNS = ("dataset", "identity", "becomes", "cosine")
FEWEST_HELD_OUT = 20  # identities: ten folds of two


@dataclass(frozen=True)
class Part:
    """What becomes of a dataset."""

    dataset: Dataset
    labels_N: np.ndarray  # int64, the label of each identity in the result; −1: left out
    without: frozenset[int] = frozenset()  # sample ids left out
    first_id: int = 0  # added to the sample ids


def merge(
    datasets: Sequence[AnyPath],
    out: Path,
    same_names: bool = False,
    model: str | None = None,
    net: str | None = None,
    overlap: float = 0.7,
    without: Path | None = None,
    on_ray: bool = True,
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
        without: of one dataset, a CSV with a column ``sample_id``, such as ``findings.csv`` of ``bigface clean``.

    Returns:
        images, identities, joined (identities that were found in an earlier dataset), left_out (images).

    Raises:
        UserError: datasets that differ in layout or image size, a used ``out``, or an unreadable list.
    """
    if without and len(datasets) > 1:
        raise UserError("--without is for one dataset, since each has sample ids of its own; clean first, then merge")
    opened = [open_dataset(path) for path in datasets]
    left_out = read_sample_ids(without) if without else frozenset()
    prepare(out)
    names = [dataset.identity_names() for dataset in opened]
    becomes, cosines = _new_identities(names), [np.full(len(own), np.nan) for own in names]
    if same_names:
        _join_by_name(names, becomes)
    if model:
        _join_by_centre(opened, becomes, cosines, model, net, overlap, out, on_ray, progress)
    used, flat = np.unique(np.concatenate(becomes), return_inverse=True)
    labels = np.split(flat, np.cumsum([len(own) for own in names])[:-1])
    titles = _titles(datasets, names)
    firsts = np.cumsum([0] + [_largest_id(dataset) + 1 for dataset in opened[:-1]])
    parts = [
        Part(dataset, own, left_out, first) for dataset, own, first in zip(opened, labels, firsts.tolist(), strict=True)
    ]
    manifest = write_parts(parts, [titles[i] for i in used], out, " + ".join(map(str, datasets)), progress=progress)
    with (out / "identity_map.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(MAP_COLUMNS)
        for path, own, new, near in zip(datasets, names, becomes, cosines, strict=True):
            for name, identity, cosine in zip(own, new.tolist(), near.tolist(), strict=True):
                writer.writerow((path, name, titles[identity], "" if np.isnan(cosine) else f"{cosine:.4f}"))
    before = sum(dataset.manifest.images for dataset in opened)
    return {
        "images": manifest.images,
        "identities": manifest.identities,
        "joined": len(titles) - len(used),
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
    wanted = max(FEWEST_HELD_OUT, round(share * len(able)))
    if wanted > len(able) // 2:
        raise UserError(f"{shards}: {wanted} of {len(able)} identities with two images or more cannot be held out")
    held_out = np.isin(np.arange(len(names)), rng.generator(seed, "split").choice(able, wanted, replace=False))
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty")
    prepare(out / "train")
    kept = np.flatnonzero(~held_out)
    labels = np.full(len(names), -1)
    labels[kept] = np.arange(len(kept))
    train = write_parts([Part(dataset, labels)], [names[i] for i in kept], out / "train", str(shards), seed, progress)
    folders, written = folder_names(names), []
    for shard, group, _ in dataset.row_groups.tolist():
        for sample_id, label, jpeg, _ in dataset.read_images(shard, group):
            if held_out[label]:
                path = out / "verify" / "images" / folders[label] / f"{sample_id:08d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(jpeg)
                written.append((label, f"{folders[label]}/{path.name}"))
    written.sort()
    with (out / "verify" / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image_a", "image_b", "same", "fold"))
        own = np.unique([label for label, _ in written], return_inverse=True)[1]
        for a, b, same, fold in zip(*make_pairs(own, pairs_per_fold, seed), strict=True):
            writer.writerow((written[a][1], written[b][1], int(same), fold))
    return {
        "images": train.images,
        "identities": train.identities,
        "held_out_images": len(written),
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
    forms = {(part.dataset.manifest.layout, part.dataset.manifest.image_size) for part in parts}
    if len(forms) > 1:
        raise UserError(
            f"datasets of different form cannot be one: {', '.join(f'{a} {b} px' for a, b in sorted(forms))}"
        )
    (layout, image_size), total = forms.pop(), sum(part.dataset.manifest.images for part in parts)
    number = -(-total // min(IMAGES_PER_SHARD, max(GROUP_IMAGES, -(-total // FEWEST_SHARDS))))
    shares = [np.array_split(part.dataset.row_groups, number) for part in parts]
    counts, shards, done = np.zeros(len(names), np.int64), [], 0
    for shard in range(number):
        chunks: list[list[FlatRow]] = []
        for part, groups in zip(parts, shares, strict=True):
            for where in groups[shard].tolist():
                chunks += _selected(part, where[0], where[1], layout)
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


def read_sample_ids(path: Path) -> frozenset[int]:
    """The column ``sample_id`` of a CSV.

    Raises:
        UserError: unreadable, no such column, or no numbers in it.
    """
    try:
        with path.open(newline="") as file:
            return frozenset(int(row["sample_id"]) for row in csv.DictReader(file))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: expected a CSV with a column sample_id of whole numbers") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def prepare(out: Path) -> None:
    """Raises UserError where a dataset lies there already, or nothing can be written."""
    if (out / "manifest.json").exists():
        raise UserError(f"{out} holds a dataset; write the new one somewhere else")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for old in (*out.glob("shard-*.parquet"), *out.glob("shard-*.part")):
            old.unlink()
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None


def _selected(part: Part, shard: int, group: int, layout: Layout) -> list[list[FlatRow]]:
    """The chunks of a row group that stay, as they are called in the result."""
    chunks = chunks_of(part.dataset.read_row_group(shard, group), layout)
    kept = [
        [
            (part.first_id + sample_id, int(part.labels_N[label]), jpeg, points)
            for sample_id, label, jpeg, points in chunk
            if part.labels_N[label] >= 0 and sample_id not in part.without
        ]
        for chunk in chunks
    ]
    return [chunk for chunk in kept if chunk]


def _new_identities(names: list[list[str]]) -> list[np.ndarray]:
    """Every identity of every dataset a number of its own."""
    ends = np.cumsum([len(own) for own in names])
    return [np.arange(end - len(own), end) for end, own in zip(ends, names, strict=True)]


def _titles(datasets: Sequence[AnyPath], names: list[list[str]]) -> list[str]:
    """What each numbered identity is called: its name, with its dataset's where that alone is not distinct."""
    every = list(itertools.chain(*names))
    shared = {name for name, own in itertools.groupby(sorted(every)) if len(list(own)) > 1}
    folders = [path.resolve().name for path in datasets]
    titles = [f"{f}/{n}" if n in shared else n for f, own in zip(folders, names, strict=True) for n in own]
    if len(set(titles)) < len(titles):  # datasets of one name, or identities of one in a dataset
        titles = [f"{title}-{number}" for number, title in enumerate(titles)]
    return titles


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
    known_ND, known_N = np.zeros((0, 0), np.float32), np.zeros(0, np.int64)
    for number, dataset in enumerate(opened):
        folder = out / "embeddings" / str(number)
        embeddings = embed(model, dataset.root, folder, net, on_ray=on_ray, progress=progress)
        own_ND = all_centres(embeddings, dataset.manifest.identities)
        if number:
            nobody = np.full(len(own_ND), -1)
            row_N, cosine_N = (
                np.concatenate(parts) for parts in zip(*nearest_centres(own_ND, known_ND, nobody), strict=True)
            )
            cosines[number][:] = cosine_N
            joins = cosine_N >= overlap
            becomes[number][joins] = known_N[row_N[joins]]
        known_ND = np.concatenate([known_ND, own_ND]) if number else own_ND
        known_N = np.concatenate([known_N, becomes[number]])


def _largest_id(dataset: Dataset) -> int:
    column = "sample_id" if dataset.manifest.layout == "flat" else "sample_ids"
    tables = (dataset.read_row_group(shard, group, [column]) for shard, group, _ in dataset.row_groups.tolist())
    flat = (np.concatenate(t[column].to_numpy()) if column == "sample_ids" else t[column].to_numpy() for t in tables)
    return max(int(ids.max()) for ids in flat)

"""Merge datasets: map their identities, leave out listed images, and keep the JPEG bytes as they are.

Each new shard takes an equal share of every dataset and shuffles the rows. Ingest has shuffled each dataset already,
so the result is shuffled too.
"""

import csv
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from fr_core import rng
from fr_core.data.embeddings import Embeddings
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
from pipelines.datasets.clean import identity_centres
from pipelines.datasets.embed import embed
from pipelines.datasets.ingest import IMAGES_PER_SHARD, MIN_SHARDS, chunk_starts

STARTED, EMBEDDINGS = "merge.json", "embeddings"
OWN_FILES = ("shard-*.parquet", "shard-*.part", "manifest.json*", "identities.parquet", "identity_map.csv*")
MAP_COLUMNS = ("dataset", "identity", "becomes", "cosine")
GONE = -1  # number of an identity that is not in the result


@dataclass(frozen=True)
class Part:
    """A dataset and its place in the result. Legend: N identities of the dataset."""

    dataset: Dataset
    labels_N: np.ndarray  # int64, label of each identity in the result, or GONE
    without: Mapping[int, str] = field(default_factory=dict)  # sample id to leave out → its identity, or ""
    first_id: int = 0  # added to the sample ids

    @cached_property
    def names(self) -> list[str]:
        """Return the names of the dataset's identities."""
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
    chunk: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    trust_code: bool = False,
) -> dict[str, float]:
    """Make one dataset of several, or copy one dataset without the images of a list.

    Identities of two datasets are different people unless ``same_names`` or ``model`` joins them.
    ``identity_map.csv`` lists the new name of every identity.

    Args:
        same_names: whether identities of the same name are one person.
        model: a net for :func:`fr_core.nets.open.open_net`. It joins an identity to the nearest identity of the
            earlier datasets if the cosine of their centres is at least ``overlap``.
        overlap: cosine.
        without: CSV with a column ``sample_id``, such as ``clean.csv`` of ``bigface clean``; for one dataset only.
            If the CSV has a column ``identity``, its names must match the dataset's.
        chunk: as for :func:`write_parts`.

    Returns:
        images and identities of the result; joined: identities that joined one of an earlier dataset; shared_names:
        names that several datasets have. Also left_out: images; identities_left_out: those without an image left.

    Raises:
        UserError: datasets of different layout or image size, ``out`` in use, or an unreadable list.
    """
    if without and len(datasets) > 1:
        raise UserError("--without is for one dataset, because sample ids repeat: clean each dataset first, then merge")
    opened = [open_dataset(path) for path in datasets]
    common_form(opened)
    left_out = read_sample_list(without) if without else {}
    stamp = "+".join(dataset.stamp for dataset in opened)
    begin_job(out, STARTED, stamp, OWN_FILES, overwrite, beside=[EMBEDDINGS])
    names = [dataset.identity_names() for dataset in opened]
    becomes = _number_identities(names)
    cosines = [np.full(len(own_names), np.nan) for own_names in names]
    if same_names:
        _join_by_name(names, becomes)
    if model:

        def embedded(shards: AnyPath) -> Embeddings:
            return embed(model, shards, out / EMBEDDINGS, net, True, on_ray, False, True, progress, trust_code)

        _join_by_centre(opened, becomes, cosines, overlap, embedded)
    if left_out:
        becomes[0][_images_left(opened[0], left_out) == 0] = GONE
    numbers = np.concatenate(becomes)
    used = np.unique(numbers[numbers != GONE])
    new_labels = np.where(numbers == GONE, GONE, np.searchsorted(used, numbers))
    labels = np.split(new_labels, np.cumsum([len(own_names) for own_names in names])[:-1])
    titles = _result_names([path.resolve().name for path in datasets], names, used)
    first_ids = np.cumsum([0] + [_largest_sample_id(dataset) + 1 for dataset in opened[:-1]])
    parts = [
        Part(dataset, own_labels, left_out, first_id)
        for dataset, own_labels, first_id in zip(opened, labels, first_ids.tolist(), strict=True)
    ]
    with atomic_file(out / "identity_map.csv") as scratch, scratch.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(MAP_COLUMNS)
        for path, own_names, own_labels, own_cosines in zip(datasets, names, labels, cosines, strict=True):
            rows = zip(own_names, own_labels.tolist(), own_cosines.tolist(), strict=True)
            for name, label, cosine in rows:
                writer.writerow(
                    (path, name, "" if label == GONE else titles[label], "" if np.isnan(cosine) else f"{cosine:.4f}")
                )
    manifest = write_parts(parts, titles, out, " + ".join(map(str, datasets)), chunk=chunk, progress=progress)
    (out / STARTED).unlink()
    before = sum(dataset.manifest.images for dataset in opened)
    return {
        "images": manifest.images,
        "identities": manifest.identities,
        "joined": int((numbers != GONE).sum()) - len(used),
        "left_out": before - manifest.images,
        "identities_left_out": int((numbers == GONE).sum()),
        "shared_names": sum(count > 1 for count in Counter(itertools.chain(*map(set, names))).values()),
    }


def write_parts(
    parts: list[Part],
    names: list[str],
    out: Path,
    source: str,
    seed: int = 0,
    chunk: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write the parts as one dataset, with one shard in memory at a time.

    Args:
        names: names of the result's identities.
        chunk: images of one identity in a row of the grouped layout, at most; larger chunks are cut. None: as they are.

    Raises:
        UserError: parts of different layout or image size, no images left, or a list of another dataset's images.
    """
    layout, image_size = common_form([part.dataset for part in parts])
    total = sum(part.dataset.manifest.images for part in parts)
    chunk = chunk or max(part.dataset.manifest.chunk_images for part in parts)
    per_shard = min(IMAGES_PER_SHARD, max(GROUP_IMAGES, -(-total // MIN_SHARDS)))
    number = -(-total // per_shard)
    shares = [np.array_split(part.dataset.row_groups, number) for part in parts]
    counts, shards, done, left_out = np.zeros(len(names), np.int64), [], 0, 0
    for shard in range(number):
        chunks: list[list[FlatRow]] = []
        for part, groups in zip(parts, shares, strict=True):
            for part_shard, group, count in groups[shard].tolist():
                kept, dropped = _relabelled_chunks(part, part_shard, group, layout)
                chunks += itertools.chain.from_iterable(_cut(images, chunk) for images in kept)
                left_out += dropped
                done += count
            progress(done, total)
        for images in chunks:
            counts[images[0][1]] += len(images)
        shuffled = [chunks[i] for i in rng.generator(seed, "merge", shard).permutation(len(chunks))]
        if shuffled:
            table = flat_table(itertools.chain(*shuffled)) if layout == "flat" else grouped_table(shuffled)
            shards.append(write_shard(out / f"shard-{shard:05d}.parquet", table, layout))
    if not shards:
        raise UserError(f"{source}: no images are left: the list names all of them")
    listed = sum(len(part.without) for part in parts)
    if left_out < listed:
        missing = listed - left_out
        raise UserError(f"{missing} of the {listed} listed samples are not in {source}: the list is of another dataset")
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
        chunk_images=chunk,
    )
    write_manifest(out, manifest, names, counts)
    return manifest


def common_form(datasets: Sequence[Dataset]) -> tuple[Layout, int]:
    """Return the layout and image size that all datasets share.

    Raises:
        UserError: datasets of different layout or image size.
    """
    forms = {(dataset.manifest.layout, dataset.manifest.image_size) for dataset in datasets}
    if len(forms) > 1:
        listed = ", ".join(f"{layout} {size} px" for layout, size in sorted(forms))
        raise UserError(f"datasets of different form cannot be merged: {listed}; ingest them alike (--layout, --size)")
    return forms.pop()


def read_sample_list(path: Path) -> dict[int, str]:
    """Read the columns ``sample_id`` and, if present, ``identity`` of a CSV.

    Raises:
        UserError: an unreadable file, no column ``sample_id``, or values that are not whole numbers.
    """
    try:
        with path.open(newline="") as file:
            return {int(row["sample_id"]): row.get("identity") or "" for row in csv.DictReader(file)}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: expected a CSV with a column sample_id of whole numbers") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _relabelled_chunks(part: Part, shard: int, group: int, layout: Layout) -> tuple[list[list[FlatRow]], int]:
    """Return the chunks of a row group that stay, with their new ids and labels, and the number of listed images.

    Raises:
        UserError: the list names another identity for an image.
    """
    kept, left_out = [], 0
    for chunk in chunks_of(part.dataset.read_row_group(shard, group), layout):
        rows: list[FlatRow] = []
        for sample_id, label, jpeg, points in chunk:
            if sample_id in part.without:
                left_out += 1
                listed, actual = part.without[sample_id], part.names[label]
                if listed not in ("", actual):
                    raise UserError(
                        f"sample {sample_id} is {listed!r} in the list, {actual!r} in the dataset: "
                        "the list is of another dataset"
                    )
            elif part.labels_N[label] != GONE:
                rows.append((part.first_id + sample_id, int(part.labels_N[label]), jpeg, points))
        if rows:
            kept.append(rows)
    return kept, left_out


def _cut(images: list[FlatRow], chunk: int) -> list[list[FlatRow]]:
    """Cut the images of a chunk into nearly equal chunks."""
    if len(images) <= chunk:
        return [images]
    starts = chunk_starts(np.zeros(1, np.int64), len(images), chunk).tolist()
    return [images[start:end] for start, end in itertools.pairwise([*starts, len(images)])]


def _number_identities(names: list[list[str]]) -> list[np.ndarray]:
    """Give the identities of all datasets consecutive numbers."""
    ends = np.cumsum([len(own_names) for own_names in names])
    return [np.arange(end - len(own_names), end) for end, own_names in zip(ends, names, strict=True)]


def _result_names(folders: list[str], names: list[list[str]], used: np.ndarray) -> list[str]:
    """Return distinct names of the result's identities: ``NAME``, or ``NAME@FOLDER`` where a name repeats."""
    owners = [(name, folder) for folder, own_names in zip(folders, names, strict=True) for name in own_names]
    kept = [owners[number] for number in used.tolist()]
    name_counts = Counter(name for name, _ in kept)
    titles = [f"{name}@{folder}" if name_counts[name] > 1 else name for name, folder in kept]
    title_counts = Counter(titles)  # two folders can have the same name
    return [f"{title}-{number}" if title_counts[title] > 1 else title for number, title in enumerate(titles)]


def _join_by_name(names: list[list[str]], becomes: list[np.ndarray]) -> None:
    """Give identities of the same name the number of the first of them, in place."""
    first: dict[str, int] = {}
    for own_names, numbers in zip(names, becomes, strict=True):
        for label, name in enumerate(own_names):
            numbers[label] = first.setdefault(name, int(numbers[label]))


def _join_by_centre(
    opened: list[Dataset],
    becomes: list[np.ndarray],
    cosines: list[np.ndarray],
    overlap: float,
    embedded: Callable[[AnyPath], Embeddings],
) -> None:
    """Give an identity the number of the nearest identity of the earlier datasets, if near enough; in place."""
    known_ND = np.zeros((0, 0), np.float32)  # centres of the earlier datasets' identities, in their order
    for number, dataset in enumerate(opened):
        embeddings = embedded(dataset.root)
        own_ND = identity_centres(embeddings, dataset.manifest.identities)
        if number:
            earlier = np.concatenate(becomes[:number])
            no_label_N = np.full(len(own_ND), -1)  # every known centre belongs to another dataset
            nearest = nearest_centres(own_ND, known_ND, no_label_N)
            row_N, cosines[number] = (np.concatenate(parts) for parts in zip(*nearest, strict=True))
            joins_N = (cosines[number] >= overlap) & (row_N >= 0) & ~np.isin(becomes[number], earlier)
            moved = np.arange(sum(map(len, becomes)))
            moved[becomes[number][joins_N]] = earlier[row_N[joins_N]]
            for numbers in becomes:
                numbers[:] = moved[numbers]
        known_ND = np.concatenate([known_ND, own_ND]) if number else own_ND


def _images_left(dataset: Dataset, listed: Mapping[int, str]) -> np.ndarray:
    """Return how many images each identity has that are not on a list: int64 [N]."""
    counts_N = np.zeros(dataset.manifest.identities, np.int64)
    for ids, labels in _ids_and_labels(dataset):
        kept = ~np.isin(ids, list(listed))
        counts_N += np.bincount(labels[kept], minlength=len(counts_N))
    return counts_N


def _largest_sample_id(dataset: Dataset) -> int:
    """Return the largest sample id."""
    return max(int(ids.max()) for ids, _ in _ids_and_labels(dataset))


def _ids_and_labels(dataset: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the sample ids and labels of each row group; reads only their columns."""
    grouped = dataset.manifest.layout == "grouped"
    columns = ["sample_ids" if grouped else "sample_id", "label"]
    for shard, group, _ in dataset.row_groups.tolist():
        ids, labels = (column.to_numpy() for column in dataset.read_row_group(shard, group, columns).columns)
        yield (np.concatenate(ids), labels.repeat([len(chunk) for chunk in ids])) if grouped else (ids, labels)

"""Turn shards back into files that other programs read: a folder for each person, or WebDataset tars."""

import csv
import io
import itertools
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from fr_core.data.landmarks import LANDMARK_COLUMNS
from fr_core.data.schema import Dataset, open_dataset
from fr_core.data.store import AnyPath
from fr_core.errors import UserError

Form = Literal["folders", "webdataset"]


def unpack(
    shards: str | AnyPath,
    out: Path,
    form: Form = "folders",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write the images of a dataset, JPEG bytes unchanged, with one row group in memory at a time.

    Args:
        form: ``folders`` writes ``NAME/SAMPLE.jpg``, and ``landmarks.csv`` for images with known points.
            ``webdataset`` writes ``00000.tar`` …, one per shard, and ``identities.csv``. Each tar holds
            ``SAMPLE.jpg`` and ``SAMPLE.cls`` (the label) for each image.

    Returns:
        Number of images written.

    Raises:
        UserError: no dataset, a damaged shard, or ``out`` is not empty.
    """
    dataset = open_dataset(shards)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: name another folder, or remove this one first")
    out.mkdir(parents=True, exist_ok=True)
    total = dataset.manifest.images
    write = _write_folders if form == "folders" else _write_tars
    done = 0
    for done in write(dataset, out):
        progress(done, total)
    return done


def folder_names(names: list[str]) -> list[str]:
    """Return distinct folder names for the identities; an unsafe name becomes ``identityLABEL``."""
    safe = [name if _is_plain(name) else f"identity{label}" for label, name in enumerate(names)]
    seen: set[str] = set()
    for label in range(len(safe)):
        while safe[label].lower() in seen:  # some file systems ignore case
            safe[label] += f"-{label}"
        seen.add(safe[label].lower())
    return safe


def _is_plain(name: str) -> bool:
    """Return whether every common file system takes the name for a folder."""
    short = len(name.encode(errors="replace")) < 200
    return short and bool(name.strip(". ")) and name.isprintable() and not set(name) & set('/\\:*?"<>|')


def _write_folders(dataset: Dataset, out: Path) -> Iterator[int]:
    """Write a folder for each identity; yields the number of images written so far."""
    names, done = folder_names(dataset.identity_names()), 0
    for name in names:
        (out / name).mkdir()
    with (out / "landmarks.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", *LANDMARK_COLUMNS))
        for shard, number, _ in dataset.row_groups.tolist():
            group = dataset.read_images(shard, number)
            for sample, label, jpeg, points in group:
                path = f"{names[label]}/{sample:08d}.jpg"
                (out / path).write_bytes(jpeg)
                if points is not None:
                    writer.writerow((path, *points.ravel()))
            done += len(group)
            yield done


def _write_tars(dataset: Dataset, out: Path) -> Iterator[int]:
    """Write a tar for each shard; yields the number of images written so far."""
    with (out / "identities.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("label", "name"), *enumerate(dataset.identity_names())])
    done = 0
    for shard, groups in itertools.groupby(dataset.row_groups.tolist(), lambda group: group[0]):
        with tarfile.open(out / f"{shard:05d}.tar", "w") as archive:
            for _, number, _ in groups:
                group = dataset.read_images(shard, number)
                for sample, label, jpeg, _ in group:
                    for suffix, content in (("jpg", jpeg), ("cls", str(label).encode())):
                        info = tarfile.TarInfo(f"{sample:08d}.{suffix}")
                        info.size = len(content)
                        archive.addfile(info, io.BytesIO(content))
                done += len(group)
                yield done

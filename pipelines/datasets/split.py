"""Split a dataset: hold some people out to verify on, and keep the others to train on; once, or fold by fold."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fr_core import rng
from fr_core.config import Config
from fr_core.data.landmarks import LANDMARK_COLUMNS
from fr_core.data.schema import Dataset, open_dataset
from fr_core.data.store import AnyPath, remove_folder, write_text_atomically
from fr_core.errors import UserError
from fr_core.verify.pairs import FOLDS, write_pairs
from pipelines.datasets.merge import Part, write_parts
from pipelines.datasets.unpack import folder_names

SHARE = 0.1
PEOPLE_PER_FOLD = 2  # a pair of different people needs two
MIN_HELD_OUT = 2 * PEOPLE_PER_FOLD  # the protocol needs two folds: it sets a threshold on one, and judges the other
USUAL_HELD_OUT = FOLDS * PEOPLE_PER_FOLD
ENOUGH_HELD_OUT = 100  # people; with fewer, the interval of the accuracy is wider than ±3 points
# 95 % interval of an accuracy near 90 %: ± INTERVAL / √people, a bootstrap over people. Measured with 5 to 200 drawn
# people and a linear discriminant on pixels: 0.28 to 0.36.
INTERVAL = 0.3


def split(
    shards: AnyPath,
    out: Path,
    share: float | None = None,
    pairs_per_fold: int = 300,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Write ``train/`` shards, and ``verify/images`` with ``verify/pairs.csv`` of other people.

    ``verify/landmarks.csv`` keeps the points of the held-out images, if the dataset has points.

    Args:
        share: share of the people to hold out, at most 0.5, drawn among those with two images or more. None: see
            :func:`held_out_count`.
        pairs_per_fold: pairs of each kind in a fold. A person is in one of up to ten folds.

    Returns:
        images, identities (to train on), held_out_images, held_out_identities, folds, pairs, distinct_pairs.

    Raises:
        UserError: too few people, or ``out`` in use.
    """
    dataset = open_dataset(shards)
    counts, names = dataset.identity_counts(), dataset.identity_names()
    candidates = np.flatnonzero(counts >= 2)
    wanted = held_out_count(len(candidates), share, str(shards))
    held_out = np.isin(np.arange(len(names)), rng.generator(seed, "split").choice(candidates, wanted, replace=False))
    refuse_used_folder(dataset, out)
    held = hold_out(dataset, held_out, out, pairs_per_fold, seed, progress)
    return held | {"held_out_identities": wanted}


@dataclass(frozen=True)
class Fold:
    """A part of a dataset's people to verify on, and the shards of all others."""

    train: Path
    images: Path
    pairs: Path

    def of(self, config: Config) -> Config:
        """Return the config of a run that trains and verifies on this fold."""
        data = config.data.model_copy(update={"path": str(self.train)})
        verify = config.verify.model_copy(update={"images": str(self.images), "pairs": str(self.pairs)})
        return config.model_copy(update={"data": data, "verify": verify})


def cut_folds(
    shards: AnyPath,
    out: Path,
    count: int,
    pairs_per_fold: int = 300,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Fold]:
    """Cut the people of a dataset into equal folds, and write each fold as :func:`split` does.

    Everyone with two images or more is held out once. People are dealt by name, so flat and grouped shards of the same
    faces have equal folds. Whole folds that ``out`` holds are taken as they are; after a stop, all are cut again.

    Args:
        count: folds, 2 or more.
        pairs_per_fold: pairs of each kind in each of a fold's up to ten parts.

    Raises:
        UserError: too few people for a fold, or ``out`` holds something else.
    """
    dataset = open_dataset(shards)
    facts = {"stamp": dataset.stamp, "folds": count, "pairs_per_fold": pairs_per_fold, "seed": seed}
    folders = [out / f"fold-{number}" for number in range(count)]
    folds = [Fold(path / "train", path / "verify" / "images", path / "verify" / "pairs.csv") for path in folders]
    marker = out / "folds.json"
    if marker.is_file() and json.loads(marker.read_text()) == facts | {"whole": True}:
        return folds
    names = dataset.identity_names()
    by_name = np.argsort(names, kind="stable")
    several = by_name[dataset.identity_counts()[by_name] >= 2]
    if len(several) < count * MIN_HELD_OUT:
        raise UserError(
            f"{shards}: {len(several)} people with two images or more are too few for {count} folds: "
            f"{count * MIN_HELD_OUT} are needed, {MIN_HELD_OUT} to verify on in each fold"
        )
    if not marker.is_file():
        refuse_used_folder(dataset, out)
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(marker, json.dumps(facts | {"whole": False}) + "\n")
    dealt = rng.generator(seed, "folds").permutation(several)
    for number, folder in enumerate(folders):
        remove_folder(folder)
        held_out = np.isin(np.arange(len(names)), dealt[number::count])
        hold_out(dataset, held_out, folder, pairs_per_fold, seed, progress)
    write_text_atomically(marker, json.dumps(facts | {"whole": True}) + "\n")
    return folds


def folds_of(shards: AnyPath, out: Path, count: int) -> list[Fold]:
    """Cut a dataset into folds in a folder below ``out`` that its contents and ``count`` name, or find them there."""
    return cut_folds(shards, out / f"{shards.name}-{open_dataset(shards).stamp[:8]}-{count}", count)


def refuse_pairs(config: Config) -> None:
    """Refuse a recipe that names pairs to verify on, beside folds.

    Raises:
        UserError: it does.
    """
    if config.verify.pairs is not None:
        more = " train.verify_every=none" if config.train.verify_every else ""
        raise UserError(
            "--folds verifies on people of the training set: leave the pairs out, with verify.images=none "
            f"verify.pairs=none{more} if the recipe names them"
        )


def refuse_used_folder(dataset: Dataset, out: Path) -> None:
    """Refuse a folder that is in use, or that lies inside the dataset.

    Raises:
        UserError: it does.
    """
    source = dataset.root
    if isinstance(source, Path) and out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{out} lies inside {source}: name a folder outside the shards")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: name another folder, or remove this one first")


def hold_out(
    dataset: Dataset,
    held_out_N: np.ndarray,
    out: Path,
    pairs_per_fold: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> dict[str, float]:
    """Write the people to train on as ``train/``, and those held out (bool [N]) as ``verify/``.

    Returns:
        images, identities (to train on), held_out_images, folds, pairs, distinct_pairs.
    """
    (out / "train").mkdir(parents=True)
    names, kept = dataset.identity_names(), np.flatnonzero(~held_out_N)
    labels = np.full(len(names), -1)
    labels[kept] = np.arange(len(kept))
    part = Part(dataset, labels)
    kept_names = [names[i] for i in kept]
    train = write_parts([part], kept_names, out / "train", str(dataset.root), seed, progress=progress)
    images = _write_images(dataset, held_out_N, out / "verify")
    folds = min(FOLDS, int(held_out_N.sum()) // PEOPLE_PER_FOLD)
    pairs, distinct_pairs = write_pairs(out / "verify", pairs_per_fold, seed, folds)  # drawn with replacement
    return {
        "images": train.images,
        "identities": train.identities,
        "held_out_images": images,
        "folds": folds,
        "pairs": pairs,
        "distinct_pairs": distinct_pairs,
    }


def held_out_count(people: int, share: float | None, source: str) -> int:
    """Return how many of ``people`` to hold out: ``share``, or by default a tenth, at least 20 and at most half.

    Args:
        people: number of people with two images or more.
        source: the dataset, for errors.

    Raises:
        UserError: fewer than four people, which make no two folds, or more than half of the people.
    """
    if people < 2 * MIN_HELD_OUT:
        raise UserError(
            f"{source}: {people} people with two images or more are too few to split: "
            f"{2 * MIN_HELD_OUT} are needed, {MIN_HELD_OUT} to hold out and {MIN_HELD_OUT} to train on"
        )
    if share is None:
        return min(max(USUAL_HELD_OUT, int(SHARE * people)), people // 2)
    wanted = int(share * people + 1e-9)  # 1e-9: 0.29 · 100 is 28.99…
    if wanted < MIN_HELD_OUT:
        least = math.ceil(1000 * MIN_HELD_OUT / people) / 1000
        raise UserError(
            f"{source}: --share {share:g} of {people} people holds out {wanted}, too few for two folds of pairs: "
            f"use --share {least:g} or more, {MIN_HELD_OUT} people"
        )
    if wanted > people // 2:
        raise UserError(f"{source}: --share {share:g} holds out more than half of the {people} people: use 0.5 or less")
    return wanted


def interval_of(people: int) -> float:
    """Estimate the half-width of the 95 % interval that an accuracy near 0.9 has with so many people."""
    return INTERVAL / math.sqrt(people)


def _write_images(dataset: Dataset, held_out_N: np.ndarray, out: Path) -> int:
    """Write the images of the held-out identities (bool [N]), and their landmarks if known; return their number."""
    folders, images = folder_names(dataset.identity_names()), 0
    landmarks: list[tuple[object, ...]] = []
    for shard, group, _ in dataset.row_groups.tolist():
        for sample_id, label, jpeg, points in dataset.read_images(shard, group):
            if held_out_N[label]:
                name = f"{folders[label]}/{sample_id:08d}.jpg"
                path = out / "images" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(jpeg)
                images += 1
                if points is not None:
                    landmarks.append((name, *points.ravel()))
    if landmarks:
        with (out / "landmarks.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", *LANDMARK_COLUMNS), *sorted(landmarks)])
    return images

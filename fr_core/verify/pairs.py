"""1:1 verification on lists of pairs: 10-fold accuracy and TAR@FAR (docs/verification.md).

:mod:`fr_core.verify.report` defines the figures. Legend: P pairs, N images, D embedding.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from fr_core import rng
from fr_core.data.crops import central_square
from fr_core.data.decode import resized
from fr_core.data.photos import RejectedImage, read_file, read_rgb
from fr_core.data.resolve import resolve
from fr_core.data.sources import list_folder
from fr_core.errors import UserError
from fr_core.verify.bootstrap import accuracy_interval, tar_intervals

FOLDS = 10
FARS = (1e-1, 1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class Pairs:
    """Pairs of images."""

    paths: list[str]  # [N] of the distinct images, relative to the images' folder
    left: np.ndarray  # int64 [P], positions in ``paths``
    right: np.ndarray  # int64 [P], positions in ``paths``
    same: np.ndarray  # bool [P], True: the pair shows one person
    fold: np.ndarray  # int64 [P]
    images: list[bytes] | None = None  # [N] encoded images, if the list of pairs contains them

    def keep(self, usable: np.ndarray) -> "Pairs":
        """Return the pairs whose two images are both usable (bool [N])."""
        kept = usable[self.left] & usable[self.right]
        return replace(self, **{name: getattr(self, name)[kept] for name in ("left", "right", "same", "fold")})


@dataclass(frozen=True)
class Verification:
    """Scores of one net on one list of pairs."""

    accuracy: float  # mean over folds, in [0, 1]
    accuracy_std: float  # population standard deviation over folds
    threshold: float  # cosine; mean of the folds' thresholds
    tar_at_far: dict[float, float]  # FAR -> TAR, for each FAR of at least one impostor pair
    pairs: int
    accuracy_interval: tuple[float, float]  # 95 %, by a bootstrap over people, or over pairs if people are unknown
    tar_intervals: dict[float, tuple[float, float]]  # FAR -> 95 % interval of TAR, by the same bootstrap


class Crops(NamedTuple):
    """Face crops in the size of a net's input."""

    images: np.ndarray  # uint8 [N, size, size, 3], RGB; zeros for unreadable images
    failed: dict[str, str]  # path of a missing or unreadable image -> reason
    not_square: list[str]  # paths of images that were cropped to their central square


def read_images(root: str | Path | None, pairs: Pairs, size: int, part: Sequence[int] | None = None) -> Crops:
    """Read the images of a list of pairs.

    Args:
        root: Folder that the paths are relative to; None if the list contains the images.
        pairs: The list.
        size: Side of the net's input, pixels.
        part: Positions in ``pairs.paths`` of the images to read; None: all.

    Raises:
        UserError: The images' folder is not given or does not exist.
    """
    if pairs.images is None and (root is None or not Path(root).is_dir()):
        raise UserError(f"{root}: no such folder" if root else "the pairs need their images' folder: give --images")
    part = range(len(pairs.paths)) if part is None else part
    contents = [pairs.images[i] for i in part] if pairs.images else None
    return read_crops(Path(root or ""), [pairs.paths[i] for i in part], size, contents)


def read_crops(root: Path, paths: Sequence[str], size: int, contents: Sequence[bytes] | None = None) -> Crops:
    """Read face crops from files below ``root`` or from encoded ``contents``, and resize them once to ``size``."""
    crops = Crops(np.zeros((len(paths), size, size, 3), np.uint8), {}, [])
    files = paths if contents else resolve(paths, root)
    for i, (path, file) in enumerate(zip(paths, files, strict=True)):
        try:
            image = read_rgb(contents[i] if contents else read_file(root / file))
            crops.images[i] = resized(central_square(image), size)
            if image.shape[0] != image.shape[1]:
                crops.not_square.append(path)
        except OSError:
            crops.failed[path] = "missing"
        except RejectedImage as error:
            crops.failed[path] = str(error)
    return crops


def cosines(embeddings_ND: np.ndarray, pairs: Pairs) -> np.ndarray:
    """Return the cosine of each pair from L2-normalised embeddings: float64 [P]."""
    return np.einsum("pd,pd->p", embeddings_ND[pairs.left], embeddings_ND[pairs.right], dtype=np.float64)


def score_pairs(scores: np.ndarray, pairs: Pairs) -> Verification:
    """Score pairs by the protocol of LFW: each fold is judged at the best threshold of the other folds.

    Args:
        scores: float [P]; a larger score means more similar.
        pairs: The pairs [P].

    Raises:
        UserError: All pairs are of one kind, there are fewer than two folds, or scores are not finite.
    """
    if pairs.same.all() or not pairs.same.any():
        have, lack = ("one person", "two people") if pairs.same.all() else ("two people", "one person")
        raise UserError(
            f"all {len(pairs.same):,} pairs are of {have}, but verification needs both: add pairs of {lack}"
        )
    if not np.isfinite(scores).all():
        raise UserError("the net's embeddings are not finite, or all 0: training diverged, or the weights are broken")
    folds = np.unique(pairs.fold)
    if len(folds) < 2:
        raise UserError("verification needs two folds or more: change the column fold, or drop it for ten folds")
    thresholds = [best_threshold(scores[pairs.fold != f], pairs.same[pairs.fold != f]) for f in folds]
    right = (scores >= np.array(thresholds)[np.searchsorted(folds, pairs.fold)]) == pairs.same
    accuracies = [float(right[pairs.fold == f].mean()) for f in folds]
    fars = resolved_fars(pairs.same)
    return Verification(
        float(np.mean(accuracies)),
        float(np.std(accuracies)),
        float(np.mean(thresholds)),
        dict(zip(fars, tars(scores, pairs.same, fars).tolist(), strict=True)),
        len(scores),
        accuracy_interval(right, people(pairs)),
        tar_intervals(scores, pairs.same, people(pairs), fars),
    )


def odd_pairs(pairs: Pairs) -> dict[str, int]:
    """Count the pairs that a good list does not have, by what is odd about them; those that do not occur are left out.

    The order of a pair's images does not matter.
    """
    ends_P2 = np.sort(np.column_stack([pairs.left, pairs.right]), axis=1)
    key_P = ends_P2 @ np.array([len(pairs.paths), 1])
    distinct = len(np.unique(key_P))
    counts = {
        "pairs that repeat others": len(key_P) - distinct,
        "pairs called both same and different": len(np.unique(2 * key_P + pairs.same)) - distinct,
        "pairs of an image with itself": int((ends_P2[:, 0] == ends_P2[:, 1]).sum()),
    }
    return {what: count for what, count in counts.items() if count}


def resolved_fars(same: np.ndarray) -> list[float]:
    """Return the false accept rates that pairs can measure: rates of at least one impostor pair."""
    return [far for far in FARS if far * (~same).sum() >= 1]


def people(pairs: Pairs) -> np.ndarray:
    """Return the identities of each pair, numbered from 0: int64 [P, 2].

    The folder of an image is its identity, if that agrees with all pairs. Otherwise every pair gets an identity.
    """
    folders = np.unique([str(PurePath(path).parent) for path in pairs.paths], return_inverse=True)[1]
    both = np.column_stack([folders[pairs.left], folders[pairs.right]])
    if np.array_equal(both[:, 0] == both[:, 1], pairs.same):
        return both
    return np.repeat(np.arange(len(pairs.same))[:, None], 2, 1)


def best_threshold(scores: np.ndarray, same: np.ndarray) -> float:
    """Return the threshold t with the most right decisions ``score >= t``, midway between neighbouring scores."""
    order = np.argsort(scores, kind="stable")
    values, genuine = scores[order], same[order]
    # Cut c places the threshold above the c lowest scores. Equal scores cannot be separated.
    right = np.concatenate([[0], np.cumsum(~genuine)]) + genuine.sum() - np.concatenate([[0], np.cumsum(genuine)])
    possible = np.concatenate([[True], values[1:] > values[:-1], [True]])
    cut = int(np.argmax(np.where(possible, right, -1)))
    if cut == 0:
        return float(values[0])
    return float(np.nextafter(values[-1], np.inf) if cut == len(values) else (values[cut - 1] + values[cut]) / 2)


def tars(scores: np.ndarray, same: np.ndarray, fars: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return TAR at each FAR: float64 [FARs], NaN if there are no pairs of both kinds.

    It is the greatest true accept rate at a threshold that accepts at most this share of the impostor pairs. Sorting
    makes this fast enough for tens of millions of scores.
    """
    impostors, genuine = np.sort(scores[~same]), np.sort(scores[same])
    if not len(impostors) or not len(genuine):
        return np.full(len(fars), np.nan)
    allowed = np.floor(np.asarray(fars) * len(impostors) + 1e-9).astype(np.int64)  # 1e-9: 0.29 · 100 is 28.99…
    bounds = np.append(-np.inf, impostors)[np.maximum(len(impostors) - allowed, 0)]  # highest refused impostor
    return 1 - np.searchsorted(genuine, bounds, side="right") / len(genuine)


def verify_embeddings(
    embeddings_ND: np.ndarray, failed: dict[str, str], pairs: Pairs
) -> tuple[Verification, np.ndarray, Pairs]:
    """Score the pairs whose two images could both be read.

    Args:
        embeddings_ND: L2-normalised embeddings in the order of ``pairs.paths``.
        failed: Images that could not be read, from :func:`read_images`.
        pairs: All pairs.

    Returns:
        The figures, the cosines [P], and the scored pairs.

    Raises:
        UserError: No pair can be scored, or :func:`score_pairs` refuses the pairs.
    """
    usable = pairs.keep(np.array([path not in failed for path in pairs.paths]))
    if not len(usable.same):
        raise UserError(f"none of the {len(pairs.same)} pairs has both images: check the images' folder")
    if len(set(pairs.same)) == 2 and len(set(usable.same)) == 1:
        kind, absent = "different" if usable.same.all() else "same", next(iter(failed.items()))
        raise UserError(f"no {kind} pair has both images; {absent[0]} is {absent[1]}: check the images' folder")
    if len(set(pairs.fold)) > 1 and len(set(usable.fold)) == 1:
        absent = next(iter(failed.items()))
        raise UserError(
            f"{len(usable.same)} of {len(pairs.same)} pairs have both images, all of one fold; "
            f"{absent[0]} is {absent[1]}: check the images' folder"
        )
    scores = cosines(embeddings_ND, usable)
    return score_pairs(scores, usable), scores, usable


def write_pairs(folder: Path, per_fold: int, seed: int = 0, folds: int = FOLDS) -> tuple[int, int]:
    """Write a random ``pairs.csv`` beside ``images``, which has a folder for each identity.

    Returns:
        The number of pairs, and how many of them differ.

    Raises:
        UserError: as :func:`make_pairs`.
    """
    listing = list_folder(folder / "images")
    paths = listing.paths
    rows = list(zip(*make_pairs(listing.labels, per_fold, seed, folds), strict=True))
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image_a", "image_b", "same", "fold"))
        writer.writerows((paths[a], paths[b], int(same), fold) for a, b, same, fold in rows)
    return len(rows), len({(min(a, b), max(a, b)) for a, b, _, _ in rows})


def make_pairs(labels: np.ndarray, per_fold: int, seed: int, folds: int = FOLDS) -> tuple[np.ndarray, ...]:
    """Draw random pairs for verification. Folds share no identity.

    Args:
        labels: int [N], the identity of each image.
        per_fold: Same pairs in each fold, and different pairs in each fold.
        seed: Seed of the draw.
        folds: Number of folds.

    Returns:
        left, right (int64 [P]), same (bool [P]), fold (int64 [P]).

    Raises:
        UserError: A fold would have fewer than two identities, or no identity with two images.
    """
    random = rng.generator(seed, "pairs")
    identities = random.permutation(np.unique(labels))
    rows: list[tuple[int, int, bool, int]] = []
    for fold in range(folds):
        members = [np.flatnonzero(labels == identity) for identity in identities[fold::folds]]
        several = [images for images in members if len(images) > 1]
        if len(members) < 2 or not several:
            raise UserError(f"{len(identities)} identities are too few for {folds} folds of pairs; use {2 * folds}")
        for _ in range(per_fold):
            a, b = random.choice(several[random.integers(len(several))], 2, replace=False)
            rows.append((a, b, True, fold))
            one, other = random.choice(len(members), 2, replace=False)
            rows.append((random.choice(members[one]), random.choice(members[other]), False, fold))
    left, right, same, fold_of = (np.array(column) for column in zip(*rows, strict=True))
    return left, right, same, fold_of

"""1:1 verification on lists of pairs: 10-fold accuracy, TAR@FAR (METHODS §7).

Legend: P pairs, N images, D embedding.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from fr_core import rng
from fr_core.data.crops import RejectedImage, central_square, read_file, read_rgb
from fr_core.data.decode import resized
from fr_core.data.sources import list_folder
from fr_core.errors import UserError
from fr_core.verify.bins import read_bin
from fr_core.verify.bootstrap import accuracy_interval, tar_intervals

FOLDS = 10
FARS = (1e-1, 1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class Pairs:
    """Pairs of images, by position in ``paths``."""

    paths: list[str]  # of the distinct images, relative to the images' folder
    left: np.ndarray  # int64 [P]
    right: np.ndarray  # int64 [P]
    same: np.ndarray  # bool [P]
    fold: np.ndarray  # int64 [P]
    images: list[bytes] | None = None  # encoded, where the list brings them with it

    def keep(self, usable: np.ndarray) -> "Pairs":
        """The pairs whose two images are usable (bool [N])."""
        kept = usable[self.left] & usable[self.right]
        own = {name: getattr(self, name)[kept] for name in ("left", "right", "same", "fold")}
        return replace(self, **own)


@dataclass(frozen=True)
class Verification:
    """Scores of one net on one list of pairs."""

    accuracy: float  # mean over folds, in [0, 1]
    accuracy_std: float  # population standard deviation over folds
    threshold: float  # cosine; mean of the folds' thresholds
    tar_at_far: dict[float, float]  # FAR -> TAR, for the FARs that the impostor pairs can resolve
    pairs: int
    accuracy_interval: tuple[float, float]  # 95 %, from a bootstrap over people, else pairs; as the next
    tar_intervals: dict[float, tuple[float, float]]


def read_pairs(path: str | Path) -> Pairs:
    """Reads our CSV (``image_a,image_b,same[,fold]``), LFW's ``pairs.txt``, or a ``.bin`` with its images.

    In LFW's format (``FOLDS N`` then, fold after fold, N lines ``name i j`` and N lines ``name i name j``) image i of
    a person is ``name/name_000i.jpg``. Without folds, same and different pairs are dealt to ten in turn; those of a
    ``.bin`` are ten neighbouring parts of it.

    Raises:
        UserError: unreadable, neither format, or a bad line (named).
    """
    path = Path(path)
    if path.suffix == ".bin":
        contents, flags = read_bin(path)
        left = np.arange(len(flags)) * 2
        fold = np.arange(len(flags)) * FOLDS // len(flags)
        names = [f"{path.name}[{i}]" for i in range(len(contents))]
        return Pairs(names, left, left + 1, np.array(flags), fold, contents)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    header = lines[0].strip() if lines else ""
    if header.startswith("image_a"):
        rows = _csv_rows(path, lines)
    elif header.replace("\t", " ").replace(" ", "").isdigit():
        rows = _lfw_rows(path, lines)
    else:
        raise UserError(f"{path}: neither a CSV with columns image_a,image_b,same nor LFW's pairs.txt")
    if not rows:
        raise UserError(f"{path}: no pairs")
    index: dict[str, int] = {}
    left = np.array([index.setdefault(row[0], len(index)) for row in rows])
    right = np.array([index.setdefault(row[1], len(index)) for row in rows])
    same = np.array([row[2] for row in rows])
    fold = np.array([row[3] for row in rows])
    if (fold < 0).any():
        for value in (False, True):
            fold[same == value] = np.arange((same == value).sum()) % FOLDS
    return Pairs(list(index), left, right, same, fold)


class Crops(NamedTuple):
    """Face crops, read for a net."""

    images: np.ndarray  # uint8 [N, size, size, 3], RGB; zeros where unreadable
    failed: dict[str, str]  # path -> reason, of those that are missing or unreadable
    not_square: list[str]  # paths of those whose centre was taken for the face


def read_images(root: str | Path | None, pairs: Pairs, size: int, part: Sequence[int] | None = None) -> Crops:
    """Reads the images of a pairs list.

    Args:
        root: the folder that the paths are relative to; None where the list brings its images.
        size: of the net's input.
        part: positions in ``pairs.paths``; None: all.

    Raises:
        UserError: the images' folder is not given, or not there.
    """
    if pairs.images is None and (root is None or not Path(root).is_dir()):
        raise UserError(f"{root}: no such folder" if root else "the pairs need their images' folder")
    part = range(len(pairs.paths)) if part is None else part
    contents = [pairs.images[i] for i in part] if pairs.images else None
    return read_crops(Path(root or ""), [pairs.paths[i] for i in part], size, contents)


def read_crops(root: Path, paths: Sequence[str], size: int, contents: Sequence[bytes] | None = None) -> Crops:
    """Reads face crops from below ``root`` or out of ``contents``; resized once, straight to the net's input."""
    crops = Crops(np.zeros((len(paths), size, size, 3), np.uint8), {}, [])
    for i, path in enumerate(paths):
        try:
            image = read_rgb(contents[i] if contents else read_file(root / path))
            crops.images[i] = resized(central_square(image), size)
            if image.shape[0] != image.shape[1]:
                crops.not_square.append(path)
        except OSError:
            crops.failed[path] = "missing"
        except RejectedImage as error:
            crops.failed[path] = str(error)
    return crops


def cosines(embeddings_ND: np.ndarray, pairs: Pairs) -> np.ndarray:
    """Similarity of each pair from L2-normalised embeddings: float64 [P]."""
    return np.einsum("pd,pd->p", embeddings_ND[pairs.left], embeddings_ND[pairs.right], dtype=np.float64)


def score_pairs(scores: np.ndarray, pairs: Pairs) -> Verification:
    """The protocol of LFW: each fold is judged at the threshold that is best on the others.

    Args:
        scores: float [P], larger for more alike.

    Raises:
        UserError: pairs of one kind only, fewer than two folds, or scores that are not finite.
    """
    if pairs.same.all() or not pairs.same.any():
        raise UserError("verification needs both same and different pairs")
    if not np.isfinite(scores).all():
        raise UserError("the net's embeddings are not finite")
    folds = np.unique(pairs.fold)
    if len(folds) < 2:
        raise UserError("verification needs two folds or more")
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


def resolved_fars(same: np.ndarray) -> list[float]:
    """The false accept rates that these pairs resolve: of one impostor or more."""
    return [far for far in FARS if far * (~same).sum() >= 1]


def people(pairs: Pairs) -> np.ndarray:
    """The identities of each pair, numbered from 0: int64 [P, 2].

    A person is the folder of a photo where that agrees with all pairs; else every pair stands for itself.
    """
    folders = np.unique([str(PurePath(path).parent) for path in pairs.paths], return_inverse=True)[1]
    both = np.column_stack([folders[pairs.left], folders[pairs.right]])
    if np.array_equal(both[:, 0] == both[:, 1], pairs.same):
        return both
    return np.repeat(np.arange(len(pairs.same))[:, None], 2, 1)


def best_threshold(scores: np.ndarray, same: np.ndarray) -> float:
    """The threshold t of most right decisions ``score >= t``; midway between neighbouring scores, all cuts tried."""
    order = np.argsort(scores, kind="stable")
    values, genuine = scores[order], same[order]
    # Cut c puts the c lowest scores below the threshold; a cut inside a tie is impossible.
    right = np.concatenate([[0], np.cumsum(~genuine)]) + genuine.sum() - np.concatenate([[0], np.cumsum(genuine)])
    possible = np.concatenate([[True], values[1:] > values[:-1], [True]])
    cut = int(np.argmax(np.where(possible, right, -1)))
    if cut == 0:
        return float(values[0])
    return float(np.nextafter(values[-1], np.inf) if cut == len(values) else (values[cut - 1] + values[cut]) / 2)


def tars(scores: np.ndarray, same: np.ndarray, fars: Sequence[float] | np.ndarray) -> np.ndarray:
    """The largest true accept rates at which no more than these shares of the impostors are accepted: float64 [FARs].

    By sorting, so that it serves tens of millions of scores. NaN without pairs of both kinds.
    """
    impostors, genuine = np.sort(scores[~same]), np.sort(scores[same])
    if not len(impostors) or not len(genuine):
        return np.full(len(fars), np.nan)
    allowed = np.floor(np.asarray(fars) * len(impostors) + 1e-9).astype(np.int64)  # 1e-9: 0.29 · 100 is 28.99…
    bounds = np.append(-np.inf, impostors)[np.maximum(len(impostors) - allowed, 0)]  # the highest that is refused
    return 1 - np.searchsorted(genuine, bounds, side="right") / len(genuine)


def verify_embeddings(
    embeddings_ND: np.ndarray, failed: dict[str, str], pairs: Pairs
) -> tuple[Verification, np.ndarray, Pairs]:
    """Scores the pairs of which both images could be read.

    Args:
        embeddings_ND: L2-normalised, in the order of ``pairs.paths``.
        failed: from :func:`read_images`.

    Returns:
        The scores of the protocol, the cosines [P], and the pairs they belong to.

    Raises:
        UserError: no usable pairs are left, or as :func:`score_pairs`.
    """
    usable = pairs.keep(np.array([path not in failed for path in pairs.paths]))
    if not len(usable.same):
        raise UserError(f"none of the {len(pairs.same)} pairs has both images; is the images' folder right?")
    scores = cosines(embeddings_ND, usable)
    return score_pairs(scores, usable), scores, usable


def write_pairs(folder: Path, per_fold: int, seed: int = 0) -> None:
    """``pairs.csv`` beside the ``images`` of a folder, whose identities have folders of their own."""
    listing = list_folder(folder / "images")
    paths = listing.paths
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image_a", "image_b", "same", "fold"))
        for a, b, same, fold in zip(*make_pairs(listing.labels, per_fold, seed), strict=True):
            writer.writerow((paths[a], paths[b], int(same), fold))


def make_pairs(labels: np.ndarray, per_fold: int, seed: int, folds: int = FOLDS) -> tuple[np.ndarray, ...]:
    """Random pairs for verification: in every fold ``per_fold`` same and as many different, folds share no identity.

    Args:
        labels: int [N], the identity of each image.

    Returns:
        left, right (int64 [P]), same (bool [P]), fold (int64 [P]).

    Raises:
        UserError: a fold would have fewer than two identities, or none with two images.
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


def _csv_rows(path: Path, lines: list[str]) -> list[tuple[str, str, bool, int]]:
    rows = []
    for number, row in enumerate(csv.DictReader(lines), 2):
        try:
            same, fold = int(row["same"]), int(row["fold"]) if "fold" in row else -1
            if same not in (0, 1) or not row["image_a"] or not row["image_b"]:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: line {number}: expected image_a,image_b,same(0 or 1)[,fold]") from None
        rows.append((row["image_a"], row["image_b"], bool(same), fold))
    return rows


def _lfw_rows(path: Path, lines: list[str]) -> list[tuple[str, str, bool, int]]:
    header = [int(part) for part in lines[0].split()]
    per_fold = header[1] if len(header) == 2 else None
    rows: list[tuple[str, str, bool, int]] = []
    for number, line in enumerate(lines[1:], 2):
        words = line.split()
        if not words:
            continue
        try:
            if len(words) == 3:
                (a, i, j), b = words, words[0]
            else:
                a, i, b, j = words
            fold = len(rows) // (2 * per_fold) if per_fold else -1
            rows.append((_lfw_path(a, int(i)), _lfw_path(b, int(j)), len(words) == 3, fold))
        except ValueError:
            raise UserError(f"{path}: line {number}: expected 'name i j' or 'name i name j'") from None
    if per_fold and len(rows) != header[0] * 2 * per_fold:
        raise UserError(
            f"{path}: {len(rows)} pairs, its first line says {header[0]} folds of {2 * per_fold}: is it whole?"
        )
    return rows


def _lfw_path(name: str, number: int) -> str:
    return f"{name}/{name}_{number:04d}.jpg"

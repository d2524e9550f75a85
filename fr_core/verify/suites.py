"""Verification of a net on lists of pairs, and the comparison of two photos.

Legend: P pairs, N images, D embedding, H W pixels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fr_core.data.crops import central_square, similarity, warped
from fr_core.data.decode import resized
from fr_core.data.detect import detector, find_face
from fr_core.data.photos import RejectedImage, read_rgb
from fr_core.errors import UserError
from fr_core.nets.open import Recogniser
from fr_core.nets.verifications import Verified
from fr_core.verify.pair_lists import read_pairs
from fr_core.verify.pairs import Pairs, Verification, people, read_images, verify_embeddings
from fr_core.verify.report import det_figure, roc_figure, score_figure, verification_figures

TABLE_FAR = 1e-3
PAIRS_FILES = ("pairs.csv", "pairs.txt")
OFTEN_WRONG = 0.3  # share of wrong decisions that makes the cosines near a threshold uncertain


@dataclass(frozen=True)
class Result:
    """Scores of a net on one list of pairs, and the images that were left out."""

    verification: Verification
    scores: np.ndarray  # float64 [P], cosines
    pairs: Pairs  # those that were scored
    failed: dict[str, str]  # image -> why it could not be read
    skipped: int  # pairs left out because an image could not be read
    not_square: list[str]  # images whose centre was taken for the face


def verify(
    embed: Callable[[np.ndarray], np.ndarray],
    images: Path | None,
    pairs_file: Path,
    size: int,
    out: Path | None = None,
    name: str = "this net",
    known: dict[Path, np.ndarray] | None = None,
) -> Result:
    """Score a net on a list of pairs.

    Args:
        embed: maps uint8 [N, H, W, 3] to L2-normalised embeddings [N, D].
        images: folder that the paths of the pairs are relative to; a ``.bin`` file needs none.
        size: side of the net's input in pixels; images are resized to it.
        out: folder for the ROC, DET and score pictures.
        known: embeddings of image files that earlier sets had too; this set adds its own.

    Raises:
        UserError: the pairs cannot be read, the folder does not exist, or no pair has both images.
    """
    pairs = read_pairs(pairs_file)
    known = {} if known is None or pairs.images else known
    files = [(images or pairs_file) / path for path in pairs.paths]
    new = [i for i, file in enumerate(files) if file not in known]
    crops = read_images(images, pairs, size, new)
    embedded, failed = embed(crops.images), crops.failed
    known |= {files[i]: row for i, row in zip(new, embedded, strict=True) if pairs.paths[i] not in failed}
    none = np.zeros(embedded.shape[1], np.float32)
    embeddings = np.stack([known.get(file, none) for file in files])
    verification, scores, usable = verify_embeddings(embeddings, failed, pairs)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        roc_figure({name: (scores, usable.same)}).savefig(out / "roc.png")
        det_figure({name: (scores, usable.same)}).savefig(out / "det.png")
        score_figure(scores, usable.same, verification.threshold).savefig(out / "scores.png")
    return Result(verification, scores, usable, failed, len(pairs.same) - len(usable.same), crops.not_square)


def verified(result: Result, pairs_file: Path) -> Verified:
    """Return what a verification leaves in a run's folder: threshold, accuracy and the list of pairs."""
    found = result.verification
    low, high = found.accuracy_interval
    return Verified(
        threshold=found.threshold,
        accuracy=found.accuracy,
        accuracy_low=low,
        accuracy_high=high,
        pairs_file=str(pairs_file),
        pairs=found.pairs,
        people=count_people(result.pairs),
        uncertain_within=uncertain_within(result.scores, result.pairs.same, found.threshold),
        figures=verification_figures(found),
    )


def count_people(pairs: Pairs) -> int | None:
    """Return the number of people in some pairs, or None where the folders of the photos do not tell."""
    people_P2 = people(pairs)
    told = not np.array_equal(people_P2[:, 0], people_P2[:, 1])  # else every pair stands for itself
    return len(np.unique(people_P2)) if told else None


def uncertain_within(scores_P: np.ndarray, same_P: np.ndarray, threshold: float) -> float:
    """Return how far from the threshold decisions are often wrong.

    Returns:
        The largest distance w at which the net decides three in ten or more of the pairs within w wrongly; 0 if there
        is none.
    """
    distances_P = np.abs(scores_P - threshold)
    order = np.argsort(distances_P, kind="stable")
    sorted_P = distances_P[order]
    wrong_P = ((scores_P >= threshold) != same_P)[order]
    wrong_share_P = np.cumsum(wrong_P) / np.arange(1, len(order) + 1)
    last_of_tie_P = np.append(np.diff(sorted_P) > 0, True)
    often_wrong = np.flatnonzero((wrong_share_P >= OFTEN_WRONG) & last_of_tie_P)
    return float(sorted_P[often_wrong[-1]]) if len(often_wrong) else 0.0


def find_sets(folder: Path) -> dict[str, tuple[Path | None, Path]]:
    """List the sets of pairs in a folder: name -> folder of the images, and pairs file.

    A set is one of these:

    - a ``.bin`` file;
    - a folder with ``pairs.csv`` or ``pairs.txt``, and its images in ``images/`` or beside the list;
    - a CSV of pairs with its images in ``images/`` or beside the CSV.

    Raises:
        UserError: the folder does not exist, holds no sets, or two sets of one name.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found: dict[str, tuple[Path | None, Path]] = {}
    bins = [(entry.stem, None, entry) for entry in sorted(folder.glob("*.bin"))]
    tables = [(entry.stem, _images_of(folder), entry) for entry in sorted(folder.glob("*.csv")) if _lists_pairs(entry)]
    lists = [entry for name in PAIRS_FILES for entry in sorted(folder.glob(f"*/{name}"))]
    for name, images, pairs in [*bins, *tables, *((file.parent.name, _images_of(file.parent), file) for file in lists)]:
        if name in found:
            raise UserError(f"{folder}: two sets are called {name}: rename one")
        found[name] = (images, pairs)
    if not found:
        raise UserError(
            f"{folder}: no sets of pairs: expected NAME.bin, NAME.csv or NAME/{' or NAME/'.join(PAIRS_FILES)}"
        )
    return dict(sorted(found.items()))


def _lists_pairs(table: Path) -> bool:
    with table.open(errors="replace") as file:
        return file.readline().startswith("image_a")


def _images_of(folder: Path) -> Path:
    return folder / "images" if (folder / "images").is_dir() else folder


def verify_suite(
    embed: Callable[[np.ndarray], np.ndarray], folder: Path, size: int, out: Path | None = None
) -> dict[str, Result]:
    """Score a net on every set of pairs that :func:`find_sets` finds in a folder.

    Args:
        embed, size: as :func:`verify` takes them.
        out: folder for the pictures of each set, and of all sets together.
    """
    sets = find_sets(folder)
    known: dict[Path, np.ndarray] = {}
    results = {
        name: verify(embed, images, pairs, size, out / name if out else None, name, known)
        for name, (images, pairs) in sets.items()
    }
    if out:
        curves = {name: (result.scores, result.pairs.same) for name, result in results.items()}
        roc_figure(curves).savefig(out / "roc.png")
        det_figure(curves).savefig(out / "det.png")
    return results


def suite_table(results: Mapping[str, Result]) -> list[tuple[str, ...]]:
    """Return one row a set, header first: figures in percent, with 95 % intervals."""
    rows: list[tuple[str, ...]] = [("set", "pairs", "accuracy %", "95 %", "TAR@FAR 1e-3 %", "95 %", "left out")]
    for name, result in results.items():
        found = result.verification
        cells = [f"{100 * found.accuracy:.2f} ± {100 * found.accuracy_std:.2f}", _interval(found.accuracy_interval)]
        tar = found.tar_at_far.get(TABLE_FAR)
        cells += ["", ""] if tar is None else [f"{100 * tar:.2f}", _interval(found.tar_intervals[TABLE_FAR])]
        rows.append((name, str(found.pairs), *cells, str(result.skipped)))
    return rows


def _interval(ends: tuple[float, float]) -> str:
    return f"{100 * ends[0]:.2f} – {100 * ends[1]:.2f}"


def photo_similarity(recogniser: Recogniser, a: Path, b: Path, align: bool = False) -> tuple[float, list[Path]]:
    """Return the cosine of the faces on two photos, and the photos whose centre was taken for the face.

    Args:
        align: find and align the face on each photo; otherwise a photo is a face crop, cut to its central square.

    Raises:
        UserError: a photo is missing or unreadable, no face is found, or ``bigface[align]`` is not installed.
    """
    if align:
        detector()  # if it is not installed, say so before any photo is read
    size = recogniser.net.input_size
    crops, not_square = [], []
    for path in (a, b):
        try:
            image = read_rgb(path.read_bytes())
            if align:
                crops.append(warped(image, similarity(find_face(image), size), size))
                continue
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except RejectedImage as error:
            raise UserError(f"{path}: {_reason(error)}") from None
        if image.shape[0] != image.shape[1]:
            not_square.append(path)
        crops.append(resized(central_square(image), size))
    left_D, right_D = recogniser.embed(np.stack(crops))
    return float(left_D @ right_D), not_square


def _reason(error: RejectedImage) -> str:
    if str(error) == "no face":
        return "no face found in this photo: give one that shows a face, or a face crop without --align"
    return str(error)

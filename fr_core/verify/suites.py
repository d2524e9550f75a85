"""Verification of a net on pairs, and the comparison of two photos."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fr_core.data.crops import RejectedImage, central_square, read_rgb
from fr_core.data.decode import resized
from fr_core.errors import UserError
from fr_core.nets.open import Recogniser
from fr_core.verify.pairs import Pairs, Verification, read_images, read_pairs, verify_embeddings
from fr_core.verify.report import det_figure, roc_figure, score_figure

TABLE_FAR = 1e-3
PAIRS_FILES = ("pairs.csv", "pairs.txt")


@dataclass(frozen=True)
class Result:
    verification: Verification
    scores: np.ndarray  # float64 [P], cosines
    pairs: Pairs  # those that were scored
    failed: dict[str, str]  # image -> why it could not be read
    skipped: int  # pairs left out for it
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
    """Scores a net on a list of pairs.

    Args:
        embed: uint8 [N, H, W, 3] -> L2-normalised [N, D].
        images: folder that the pairs' paths are relative to; a ``.bin`` needs none.
        size: of the net's input, which images are resized to.
        out: folder for ROC and score pictures.
        known: embeddings of files that other sets have too; grows by this set's.

    Raises:
        UserError: unreadable pairs, no such folder, or no pair with both images.
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


def find_sets(folder: Path) -> dict[str, tuple[Path | None, Path]]:
    """The sets of pairs in a folder: name -> images' folder and pairs file.

    A set is a ``.bin``; a folder with ``pairs.csv`` or ``pairs.txt`` and the images, in ``images/`` or beside it; or a
    CSV of pairs whose images lie so.

    Raises:
        UserError: no such folder, or no sets in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found: dict[str, tuple[Path | None, Path]] = {}
    bins = [(entry.stem, None, entry) for entry in sorted(folder.glob("*.bin"))]
    tables = [(entry.stem, _images_of(folder), entry) for entry in sorted(folder.glob("*.csv")) if _lists_pairs(entry)]
    lists = [entry for name in PAIRS_FILES for entry in sorted(folder.glob(f"*/{name}"))]
    for name, images, pairs in [*bins, *tables, *((file.parent.name, _images_of(file.parent), file) for file in lists)]:
        if name in found:
            raise UserError(f"{folder}: two sets are called {name}")
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
    """Scores a net on every set of pairs in a folder, as :func:`find_sets` finds them.

    Args:
        size: of the net's input.
        out: folder for the sets' pictures, and those of all sets together.
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
    """One row a set, header first: figures in percent, with 95 % intervals."""
    rows: list[tuple[str, ...]] = [("set", "pairs", "accuracy %", "95 %", "TAR@FAR 1e-3 %", "95 %", "left out")]
    for name, result in results.items():
        own = result.verification
        cells = [f"{100 * own.accuracy:.2f} ± {100 * own.accuracy_std:.2f}", _interval(own.accuracy_interval)]
        tar = own.tar_at_far.get(TABLE_FAR)
        cells += ["", ""] if tar is None else [f"{100 * tar:.2f}", _interval(own.tar_intervals[TABLE_FAR])]
        rows.append((name, str(own.pairs), *cells, str(result.skipped)))
    return rows


def _interval(ends: tuple[float, float]) -> str:
    return f"{100 * ends[0]:.2f} – {100 * ends[1]:.2f}"


def similarity(recogniser: Recogniser, a: Path, b: Path) -> tuple[float, list[Path]]:
    """Cosine of two face crops, and those of them that are not square (their centre is compared).

    Raises:
        UserError: a photo is missing or unreadable.
    """
    crops, odd = [], []
    for path in (a, b):
        try:
            image = read_rgb(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except RejectedImage as error:
            raise UserError(f"{path}: {error}") from None
        if image.shape[0] != image.shape[1]:
            odd.append(path)
        crops.append(resized(central_square(image), recogniser.net.input_size))
    left, right = recogniser.embed(np.stack(crops))
    return float(left @ right), odd

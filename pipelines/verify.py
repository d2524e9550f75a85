"""Verification of a net on pairs, and the comparison of two photos."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fr_core.data.crops import TEMPLATE_SIZE, RejectedImage, read_rgb, square
from fr_core.errors import UserError
from fr_core.verify.pairs import Pairs, Verification, read_images, read_pairs, verify_embeddings
from fr_core.verify.report import roc_figure, score_figure


@dataclass(frozen=True)
class Result:
    verification: Verification
    scores: np.ndarray  # float64 [P], cosines
    pairs: Pairs  # those that were scored
    failed: dict[str, str]  # image -> why it could not be read
    skipped: int  # pairs left out for it


def verify(
    embed: Callable[[np.ndarray], np.ndarray],
    images: Path | None,
    pairs_file: Path,
    out: Path | None = None,
    name: str = "this net",
) -> Result:
    """Scores a net on a list of pairs.

    Args:
        embed: uint8 [N, H, W, 3] -> L2-normalised [N, D].
        images: folder that the pairs' paths are relative to; a ``.bin`` needs none.
        out: folder for ROC and score pictures.

    Raises:
        UserError: unreadable pairs, no such folder, or no pair with both images.
    """
    pairs = read_pairs(pairs_file)
    pixels, failed = read_images(images, pairs, TEMPLATE_SIZE)
    verification, scores, usable = verify_embeddings(embed(pixels), failed, pairs)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        roc_figure({name: (scores, usable.same)}).savefig(out / "roc.png")
        score_figure(scores, usable.same, verification.threshold).savefig(out / "scores.png")
    return Result(verification, scores, usable, failed, len(pairs.same) - len(usable.same))


def similarity(embed: Callable[[np.ndarray], np.ndarray], a: Path, b: Path) -> tuple[float, list[Path]]:
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
        crops.append(square(image, TEMPLATE_SIZE))
    left, right = embed(np.stack(crops))
    return float(left @ right), odd

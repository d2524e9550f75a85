"""Verification of a net on masked and standard faces (MFR)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fr_core.data.listing import is_image
from fr_core.errors import UserError
from fr_core.nets.open import Recogniser
from fr_core.verify.mfr import WEIGHTS, NonMatches, nonmatches, score
from fr_core.verify.pairs import read_crops
from fr_core.verify.report import far_name

PART = 1024  # images in memory at once


@dataclass(frozen=True)
class MfrResult:
    """Scores of a net on masked and standard faces."""

    nonmatches: dict[str, NonMatches]  # masked and standard
    score: float | None  # lower is better; None if a kind has fewer than 100,000 impostor pairs
    images: int
    failed: dict[str, str]  # image -> why it could not be read


def verify_mfr(recogniser: Recogniser, root: Path, progress: Callable[[int], None] | None = None) -> MfrResult:
    """Score a net by the protocol of :mod:`fr_core.verify.mfr`, which also describes the folder.

    Args:
        root: folder with ``masked/NAME/*`` and ``standard/NAME/*``.
        progress: called with the number of images after each batch.

    Raises:
        UserError: one of the folders holds no images, or there are no pairs of both kinds.
    """
    paths = {name: _images(root, name) for name in WEIGHTS}
    names = sorted({path.split("/")[1] for listed in paths.values() for path in listed})
    failed: dict[str, str] = {}
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for kind, listed in paths.items():
        parts = []
        for start in range(0, len(listed), PART):
            crops = read_crops(root, listed[start : start + PART], recogniser.net.input_size)
            failed |= crops.failed
            parts.append(recogniser.embed(crops.images, progress=progress))
        usable = np.array([path not in failed for path in listed])
        people = np.searchsorted(names, [path.split("/")[1] for path in listed])
        found[kind] = np.concatenate(parts)[usable], people[usable]
    results = {
        "masked": nonmatches(*found["masked"], *found["standard"]),
        "standard": nonmatches(*found["standard"]),
    }
    return MfrResult(results, score(results), sum(map(len, paths.values())), failed)


def mfr_figures(result: MfrResult) -> dict[str, float]:
    """Return flat figures such as mfr, masked_fnmr_at_fmr_1e-5 and standard_fnmr_at_fmr_1e-5."""
    figures: dict[str, float] = {} if result.score is None else {"mfr": result.score}
    for kind, found in result.nonmatches.items():
        figures |= {f"{kind}_fnmr_at_fmr_{far_name(fmr)}": fnmr for fmr, fnmr in found.fnmr.items()}
        figures |= {f"{kind}_genuine": found.genuine, f"{kind}_impostors": found.impostors}
    return figures | {"images": result.images, "missing_images": len(result.failed)}


def _images(root: Path, kind: str) -> list[str]:
    """List the images below ``root`` as paths ``KIND/NAME/…``."""
    found = [path for path in (root / kind).rglob("*") if is_image(path.name)]
    inside = sorted(str(path.relative_to(root)) for path in found if path.parent != root / kind)
    if not inside:
        raise UserError(f"{root / kind}: no images in it: expected {kind}/NAME/*.jpg or *.png")
    return inside

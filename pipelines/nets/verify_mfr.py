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

    nonmatches: dict[str, NonMatches]  # masked, standard
    score: float | None  # lower is better; None where there are fewer than 100,000 impostor pairs of a kind
    images: int
    failed: dict[str, str]  # image -> why it could not be read


def verify_mfr(recogniser: Recogniser, root: Path, progress: Callable[[int], None] | None = None) -> MfrResult:
    """The protocol of :mod:`fr_core.verify.mfr` on a folder as it is described there.

    Raises:
        UserError: no such folders, or no pairs of both kinds in them.
    """
    paths = {name: _images(root, name) for name in WEIGHTS}
    names = sorted({path.split("/")[1] for own in paths.values() for path in own})
    failed: dict[str, str] = {}
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for kind, own in paths.items():
        parts = []
        for start in range(0, len(own), PART):
            crops = read_crops(root, own[start : start + PART], recogniser.net.input_size)
            failed |= crops.failed
            parts.append(recogniser.embed(crops.images, progress=progress))
        usable = np.array([path not in failed for path in own])
        people = np.searchsorted(names, [path.split("/")[1] for path in own])
        found[kind] = np.concatenate(parts)[usable], people[usable]
    results = {
        "masked": nonmatches(*found["masked"], *found["standard"]),
        "standard": nonmatches(*found["standard"]),
    }
    return MfrResult(results, score(results), sum(map(len, paths.values())), failed)


def mfr_figures(result: MfrResult) -> dict[str, float]:
    """Flat figures: mfr, masked_fnmr_at_fmr_1e-5, standard_fnmr_at_fmr_1e-5, …"""
    figures: dict[str, float] = {} if result.score is None else {"mfr": result.score}
    for kind, own in result.nonmatches.items():
        figures |= {f"{kind}_fnmr_at_fmr_{far_name(fmr)}": fnmr for fmr, fnmr in own.fnmr.items()}
        figures |= {f"{kind}_genuine": own.genuine, f"{kind}_impostors": own.impostors}
    return figures | {"images": result.images, "missing_images": len(result.failed)}


def _images(root: Path, kind: str) -> list[str]:
    """Paths ``KIND/NAME/…`` below ``root``."""
    found = [path for path in (root / kind).rglob("*") if is_image(path.name)]
    inside = sorted(str(path.relative_to(root)) for path in found if path.parent != root / kind)
    if not inside:
        raise UserError(f"{root / kind}: no images in it: expected {kind}/NAME/*.jpg or *.png")
    return inside
